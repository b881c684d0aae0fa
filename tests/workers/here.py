"""Workers without processes, for tests of what is given to them."""

from context_forcing.workers.job import Death, Worker


class Here:
    """Does jobs in this process when it is waited for, the last one first: they end in another order than they begin.

    A worker dies in each job of a name in `deadly`, so many times.
    """

    def __init__(self, count=1, **deadly):
        self.count, self.device, self.deadly, self.worker = count, "cpu", deadly, Worker()
        self.running, self.begun, self.is_closed = {}, [], False

    def give(self, place, job):
        assert place not in self.running and place < self.count
        self.running[place] = job
        self.begun.append(job.name)

    def wait(self, seconds):
        place, job = self.running.popitem()
        if self.deadly.get(job.name, 0):
            self.deadly[job.name] -= 1
            return [(place, Death(reason="ended by SIGKILL"))]
        return [(place, self.worker.do(job))]

    def close(self):
        self.is_closed = True
        self.running.clear()
