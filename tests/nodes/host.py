"""A ComfyUI server for tests: where it is, how it starts, how tests use it."""

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import websocket
from PIL import Image

CHECKOUT = Path(__file__).parents[2]
PACK = "My-Pack_v1.0"
"""An awkward folder name, no Python identifier. Without a space: ComfyUI serves no files of folders that have one."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Sums depend on the number of CPU threads: the host and the command line are compared at one thread."""
BOOT_SECONDS = 180
RUN_SECONDS = 300
TEXT, PREVIEW_WITH_METADATA = 3, 4

NODE_IDS = (
    "ContextForcingLoadDemo",
    "ContextForcingLoadStudent",
    "ContextForcingMemory",
    "ContextForcingRemember",
    "ContextForcingReference",
    "ContextForcingSampler",
    "ContextForcingStoryboard",
    "ContextForcingSaveVideo",
    "ContextForcingMemoryReport",
    "ContextForcingConsistency",
    "ContextForcingSaveMemory",
    "ContextForcingLoadMemory",
    "ContextForcingStudentSettings",
)


@dataclass(frozen=True)
class ComfyUI:
    """An installation."""

    path: Path
    python: Path


def find_comfyui() -> ComfyUI | str:
    """The installation to test with, or the reason why there is none."""
    path = Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser()
    if not (path / "main.py").is_file():
        return f"no ComfyUI at {path}; set COMFYUI_PATH"
    default = path / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python = Path(os.environ.get("COMFYUI_PYTHON") or default).expanduser()
    if not python.is_file():
        return f"no Python for ComfyUI at {python}; set COMFYUI_PYTHON or run scripts/install_comfyui_env.sh"
    return ComfyUI(path, python)


@dataclass
class Run:
    """The events and results of one prompt, as a browser receives them."""

    prompt_id: str
    events: list[tuple[str, dict]] = field(default_factory=list)
    previews: list[tuple[str, bytes]] = field(default_factory=list)
    """(node id, encoded picture)."""
    texts: list[tuple[str, str]] = field(default_factory=list)
    """(node id, text shown on it while it runs)."""
    outputs: dict[str, dict] = field(default_factory=dict)
    """Results that output nodes show, by node id."""

    def all(self, kind: str) -> list[dict]:
        return [data for name, data in self.events if name == kind]

    @property
    def end(self) -> str:
        """execution_success, execution_error or execution_interrupted."""
        return next(name for name, _ in reversed(self.events) if name in ENDS)

    def progress(self, node: str) -> set[tuple[int, int]]:
        """(value, max) of a node's progress bar."""
        states = [data["nodes"][node] for data in self.all("progress_state") if node in data["nodes"]]
        return {(state["value"], state["max"]) for state in states}

    def preview_pictures(self) -> list[tuple[str, Image.Image]]:
        """(node id, picture)."""
        return [(node, Image.open(io.BytesIO(data))) for node, data in self.previews]

    @property
    def cached(self) -> set[str]:
        return {node for data in self.all("execution_cached") for node in data["nodes"]}

    @property
    def executed(self) -> set[str]:
        """Nodes that ran."""
        return {data["node"] for data in self.all("executing") if data["node"] is not None}


ENDS = ("execution_success", "execution_error", "execution_interrupted")


class Host:
    """A server with this checkout as its only custom node, in a folder of its own."""

    def __init__(self, comfyui: ComfyUI, base: Path, packs: Sequence[Path] = ()):
        """`packs` are more custom nodes."""
        self.base, self.comfyui = base, comfyui
        for folder in ("custom_nodes", "models/diffusion_models", "input", "output", "temp", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        self.packs = {PACK: CHECKOUT} | {pack.name: pack for pack in packs}
        for name, pack in self.packs.items():
            (base / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
        self.client_id = uuid.uuid4().hex
        self.log = base / "server.log"

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [
            str(self.comfyui.python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", self.address.split(":")[1],
            "--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(self.base), "--database-url",
            "sqlite:///:memory:", "--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.packs,
        ]  # fmt: skip
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.comfyui.path, env=os.environ | ONE_THREAD, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            try:
                self.get("/system_stats")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}") from None
                time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get_bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as reply:
            return reply.read()

    def get(self, path: str):
        return json.loads(self.get_bytes(path))

    def post(self, path: str, data: dict) -> dict:
        """The reply, also if the server refused the request."""
        body = json.dumps(data).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = reply.read()
        except urllib.error.HTTPError as refusal:
            text = refusal.read()
        return json.loads(text) if text else {}

    def run(
        self,
        prompt: dict,
        on_event: Callable[[str, dict], None] = lambda kind, data: None,
        workflow: dict | None = None,
    ) -> Run:
        """Queue a prompt in API format, with the `workflow` that it stands for, and follow it to its end."""
        channel = websocket.create_connection(f"ws://{self.address}/ws?clientId={self.client_id}", timeout=RUN_SECONDS)
        try:
            channel.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            extra = {"extra_data": {"extra_pnginfo": {"workflow": workflow}}} if workflow else {}
            reply = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id, **extra})
            if "prompt_id" not in reply:
                raise ValueError(f"prompt refused: {json.dumps(reply)}")
            run = Run(reply["prompt_id"])
            self._follow(channel, run, on_event)
        finally:
            channel.close()
        deadline = time.monotonic() + 30
        while run.prompt_id not in (history := self.get(f"/history/{run.prompt_id}")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no history of prompt {run.prompt_id}")
            time.sleep(0.05)
        run.outputs = history[run.prompt_id]["outputs"]
        return run

    def _follow(self, channel: websocket.WebSocket, run: Run, on_event: Callable[[str, dict], None]) -> None:
        while True:
            opcode, message = channel.recv_data()
            if opcode == websocket.ABNF.OPCODE_BINARY:
                kind, length = struct.unpack(">II", message[:8])
                end = 8 + length
                if kind == TEXT:
                    run.texts.append((message[8:end].decode(), message[end:].decode()))
                if kind == PREVIEW_WITH_METADATA:
                    run.previews.append((json.loads(message[8:end])["node_id"], message[end:]))
                continue
            event = json.loads(message)
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") != run.prompt_id:
                continue
            run.events.append((kind, data))
            on_event(kind, data)
            if kind in ENDS:
                return

    def view(self, shown: dict) -> bytes:
        """The file an output node shows."""
        return self.get_bytes(f"/view?{urllib.parse.urlencode(shown)}")

    def output_path(self, shown: dict) -> Path:
        return self.base / shown["type"] / shown["subfolder"] / shown["filename"]

    def add_model(self, folder: str, path: Path, name: str | None = None) -> None:
        """Copy a model file into a models folder. The server need not be restarted."""
        shutil.copyfile(path, self.base / "models" / folder / (name or path.name))


def template(begin: str) -> dict:
    """The one template whose name begins so, as the page saves it."""
    (path,) = (path for path in (CHECKOUT / "workflows").glob("*.json") if path.stem.startswith(begin))
    return json.loads(path.read_text(encoding="utf-8"))


def to_api(workflow: dict, object_info: dict) -> dict:
    """A workflow as the page saves it -> the prompt it queues. For flat workflows of nodes that all run."""
    links = {link_id: (str(source), slot) for link_id, source, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        if node.get("mode"):
            raise ValueError(f"node {node['id']} is muted or bypassed")
        values = iter(node.get("widgets_values") or [])
        wired = {entry["name"]: entry["link"] for entry in node.get("inputs", []) if entry.get("link") is not None}
        inputs = {}
        for name, (kind, *options) in _specs(object_info[node["type"]]):
            if _is_widget(kind):
                # A workflow that was saved before an input was added has no value of it. The page takes the default.
                inputs[name] = next(values, options[0].get("default") if options else None)
                if options and options[0].get("control_after_generate"):
                    next(values)
            if name in wired:
                inputs[name] = list(links[wired[name]])
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _specs(info: dict) -> list[tuple[str, list]]:
    """(name, [type, options]) in the order in which widgets are saved."""
    return [
        (name, info["input"][part][name])
        for part in ("required", "optional")
        for name in info["input_order"].get(part, [])
    ]


def _is_widget(kind) -> bool:
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
