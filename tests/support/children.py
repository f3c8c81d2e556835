"""Programs that each need a process of their own, without what importing torch costs each."""

import subprocess
import sys

# What transformers imports of torch, and nothing of transformers itself.
_PARENT = """
import os, sys
import torch, torch._dynamo, torch.distributed.tensor
assert "transformers" not in sys.modules
for program in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(program)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_each(*programs: str) -> tuple[list[int], str]:
    """Exit status of each program, run in a process that has imported torch, and what they say."""
    command = [sys.executable, "-c", _PARENT, *programs]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in run.stdout.splitlines()], run.stderr
