"""A process that hands entries to Weights & Biases: a line of JSON in, an answer out. `wandb_tracker` starts it.

A process of its own, as W&B starts threads and processes, takes signals and waits for its server at Python's end: nothing
of that reaches the training. What W&B needs besides is in the environment.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sys
import threading
from typing import Any, TextIO

FINISH_SECONDS = 60.0  # after the training's end, or its kill


def main() -> None:
    """Answers lines until there are no more. The first one that fails is the last."""
    for number in (signal.SIGINT, signal.SIGTERM):  # for the training process, whose end is that of the lines
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    run: Any = None
    for line in sys.stdin:
        message, answer = json.loads(line), {}
        try:
            if "config" in message:
                run = begin(message["config"])
                answer = {"url": str(run.url or ""), "folder": os.path.dirname(run.dir), "offline": bool(run.offline)}
            elif "end" in message:
                end(run, 0)
            else:
                send(run, message)
        except BaseException as error:  # W&B raises errors of all kinds
            give(answers, {"error": f"{type(error).__name__}: {error}"})
            os._exit(1)
        give(answers, answer)
    end(run, 1)  # the training was killed
    os._exit(0)


def begin(config: dict) -> Any:
    """A run of W&B. Its numbers are drawn over `step`, as W&B's own steps cannot go back with a resumed run."""
    import wandb

    run = wandb.init(config=config, allow_val_change=True)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def send(run: Any, message: dict) -> None:
    """Numbers, pictures and a diagnosis of a step."""
    import wandb
    from PIL import Image

    values = dict(message["numbers"])
    for name, data in message["pictures"].items():
        values[name] = wandb.Image(Image.open(io.BytesIO(base64.b64decode(data))))
    if values:
        run.log({"step": message["step"], **values})
    for name, value in message["numbers"].items():
        if name.startswith("knn/"):
            run.summary[name] = value
            run.summary[f"{name}/best"] = max(value, run.summary.get(f"{name}/best", value))
    if message["name"]:
        text = f"step {message['step']}: {message['sentence']}"
        run.summary[f"diagnosis/{message['name']}"] = text
        run.alert(title=message["name"], text=text)


def end(run: Any, code: int) -> None:
    """Waits for what is under way, within bounds."""
    timer = threading.Timer(FINISH_SECONDS, os._exit, [1])
    timer.daemon = True
    timer.start()
    if run is not None:
        run.finish(exit_code=code)
    timer.cancel()


def give(answers: TextIO, answer: dict) -> None:
    try:
        print(json.dumps(answer), file=answers, flush=True)
    except OSError:  # the training is gone
        os._exit(1)


if __name__ == "__main__":
    main()
