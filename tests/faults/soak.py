"""Half an hour of video in one run, and in 60 chained segments with a file between: time per chunk and memory.

python tests/faults/soak.py FOLDER [MINUTES] [STUDENT]; writes FOLDER/run.csv, FOLDER/chain.csv and prints a summary.
"""

import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import yaml

from context_forcing.memory.snapshot import load_memory, save_memory
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.video.generate import GenerateRequest, open_job
from context_forcing.video.pipeline import Pipeline
from context_forcing.video.story import SegmentSpec, Story

PROMPTS = ("A meadow under a clear sky by day. The camera pans right.", "A meadow at dusk. The camera pans left.")
NUM_SEGMENTS = 60
PAGE = resource.getpagesize()


def rss() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Record:
    """CPU time and memory per chunk, in a table."""

    def __init__(self, path: Path):
        self.path, self.rows = path, list[tuple[int, float, int]]()
        path.write_text("chunk,cpu_seconds,rss\n")
        self.last = time.process_time()

    def add(self, chunk: int) -> None:
        now = time.process_time()
        self.rows.append((chunk, now - self.last, rss()))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(",".join(map(str, self.rows[-1])) + "\n")
        self.last = now

    def parts(self, num_parts: int = 6) -> str:
        """Median CPU milliseconds of a chunk and megabytes at the end, of equal parts of the film."""
        size, words = len(self.rows) // num_parts, []
        for part in range(num_parts):
            rows = self.rows[part * size : (part + 1) * size]
            median = statistics.median(seconds for _, seconds, _ in rows)
            words.append(f"{1e3 * median:.0f} ms {rows[-1][2] / 1e6:.0f} MB")
        return "  ".join(words)


def segments(minutes: float) -> list[SegmentSpec]:
    seconds = 60 * minutes / NUM_SEGMENTS
    return [SegmentSpec(prompt=PROMPTS[number % 2], seconds=seconds) for number in range(NUM_SEGMENTS)]


def one_run(folder: Path, minutes: float, student: StudentSource) -> torch.Tensor:
    """`context-forcing generate --memory-out`."""
    story = {"seed": 1, "segments": [{"prompt": each.prompt, "seconds": each.seconds} for each in segments(minutes)]}
    (folder / "story.yaml").write_text(yaml.safe_dump(story))
    request = GenerateRequest(
        story=folder / "story.yaml", output=folder / "film.mp4", student=student, scale=1,
        memory_out=folder / "film.memory",
    )  # fmt: skip
    record = Record(folder / "run.csv")
    with open_job(request) as job:
        frames = job.run(lambda chunk, note: record.add(chunk))
        print(f"one run: {frames} frames\n{record.parts()}", flush=True)
        return torch.cat(job.memory.latent_chunks, dim=2)


def chained(folder: Path, minutes: float, student: StudentSource) -> torch.Tensor:
    """A memory file between two segments, as Save Memory and Load Memory do it."""
    pipeline = Pipeline.load(student.open(), torch.device("cpu"), torch.float32)
    memory, record, chunk = pipeline.empty_memory(), Record(folder / "chain.csv"), 0
    for number, segment in enumerate(segments(minutes)):
        for memory in pipeline.generate(Story(segments=(segment,), seed=1).resolve(pipeline.card, memory), memory):
            record.add(chunk := chunk + 1)
        save_memory(folder / "chain.memory", memory)
        began = time.process_time()
        memory = load_memory(folder / "chain.memory", pipeline.fingerprint)
        record.last = time.process_time()
        if number % 10 == 9:
            size = (folder / "chain.memory").stat().st_size / 1e6
            print(f"segment {number + 1}: file {size:.0f} MB, read in {record.last - began:.2f} s", flush=True)
    print(f"chain\n{record.parts()}", flush=True)
    return torch.cat(memory.latent_chunks, dim=2)


def main() -> None:
    torch.set_num_threads(1)
    folder, minutes = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 30.0
    student = StudentSource(sys.argv[3] if len(sys.argv) > 3 else None)
    folder.mkdir(parents=True, exist_ok=True)
    whole, parts = one_run(folder, minutes, student), chained(folder, minutes, student)
    print(f"the same latents: {torch.equal(whole, parts)}; {whole.nbytes / 1e6:.1f} MB of latents")


if __name__ == "__main__":
    main()
