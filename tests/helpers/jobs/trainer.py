"""A script with a Hugging Face Trainer, with the callback where it is told so; it notes what its model was given."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch.distributed as dist

from tests.helpers.trainer_jobs import digest, trainer, whole


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deepspeed")
    parser.add_argument("--evaluate", action="store_true", help="and do not train")
    parser.add_argument("--callback", help="the section's file, or 'yes' for that in the DeepSpeed config")
    arguments = parser.parse_args()
    if arguments.deepspeed is not None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build would take half a minute
    callbacks = []
    if arguments.callback:
        from rehearsal_plugin import RehearsalCallback

        callbacks = [RehearsalCallback(None if arguments.callback == "yes" else arguments.callback)]
    keys = {} if arguments.deepspeed is None else {"deepspeed": arguments.deepspeed}
    job, recorder = trainer(arguments.out, callbacks=callbacks, gradient_accumulation_steps=2, **keys)
    if arguments.evaluate:
        note = {"loss": job.evaluate()["eval_loss"], "sizes": recorder.evaluated}
    else:
        job.train()
        note = {"digest": digest(job.model), "sizes": [len(whole(batch)) for batch in recorder.batches]}
    (arguments.out / f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(note))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
