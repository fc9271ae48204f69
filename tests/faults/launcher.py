"""Starts the processes of a run as torchrun does, but from a process that has imported everything: in milliseconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch.distributed as dist
from faults.child import Plan, train

PATIENCE = 60.0  # seconds after which a run hangs that nobody disturbs
GRACE = 30.0  # seconds that a launcher gives its processes after SIGTERM, as torchrun does
KILLED = 2  # exit code of a launcher that had to kill one of them then
PRELOADED = ["patchlight.recipes.command", "patchlight.engine.probe", "patchlight.data.torchvision_loader"]
PRELOADED += ["torch.utils.tensorboard"]


class Launched:
    """A run on one or more processes, all in a session of their own, so that none can be overlooked."""

    def __init__(self, plan: Plan, processes: int = 1) -> None:
        plan.notes.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        receiver, sender = context.Pipe(duplex=False)
        self.plan, self.processes = plan, processes
        self.launcher = context.Process(target=_launch, args=(plan, processes, sender))
        self.launcher.start()
        sender.close()
        assert receiver.poll(PATIENCE), "the launcher did not start"
        self.pids: list[int] = receiver.recv()  # by rank; the launcher itself if it is alone
        self.session = self.launcher.pid
        self.began = time.perf_counter()

    def kill(self, victim: str, number: int, rank: int = 0) -> None:
        """Sends a signal to a rank, to all, or to the launcher."""
        with contextlib.suppress(ProcessLookupError):
            if victim == "all":
                os.killpg(self.session, number)
            else:
                os.kill(self.pids[rank] if victim == "rank" else self.session, number)

    def ended(self, seconds: float = PATIENCE) -> bool:
        """Whether every process of the session ends in that time."""
        until = time.perf_counter() + seconds
        self.launcher.join(seconds)
        while members(self.session):
            if time.perf_counter() > until:
                return False
            time.sleep(0.01)
        return True

    def end(self) -> None:
        """Kills what is left."""
        for pid in members(self.session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.join(PATIENCE)


def members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, of = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                if int(of) == session and state not in "ZX":
                    found.append(int(folder.name))
    return found


def _launch(plan: Plan, processes: int, sender) -> None:
    os.setsid()
    if processes == 1:
        sender.send([os.getpid()])
        train(plan, 0)
    pids, doors = [], []
    for rank in range(processes):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(writer)
                port = os.read(reader, 16).decode()
                if port:
                    _join(rank, processes, port)
                    train(plan, rank)
            finally:
                os._exit(1)
        os.close(reader)
        pids.append(pid)
        doors.append(writer)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for door in doors:
        os.write(door, str(store.port).encode())
        os.close(door)
    sender.send(pids)
    os._exit(_wait_for(pids))


def _join(rank: int, world: int, port: str) -> None:
    """The environment that torchrun gives its processes."""
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torchrun |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    torchrun |= {"LOCAL_WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "faults"}
    os.environ.update({name: str(value) for name, value in torchrun.items()})


def _wait_for(pids: list[int]) -> int:
    """As torchrun does: ends all when one fails or when it is told to end, first by SIGTERM, later by SIGKILL."""
    left, ending, code = set(pids), 0.0, 0

    def end_all(*_) -> None:
        nonlocal ending
        ending = ending or time.perf_counter()
        for pid in left:
            os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end_all)
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in left:
            left.discard(pid)
            if status and not ending:
                code = 1
                end_all()
        elif ending and time.perf_counter() > ending + GRACE:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            ending, code = float("inf"), KILLED
        else:
            time.sleep(0.005)
    return code
