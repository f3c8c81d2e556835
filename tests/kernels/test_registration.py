"""The format is registered while Transformers is imported: by threads, and after a failure too."""

from support.children import run_each

MAPPED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping
assert "lestd" in mapping
"""
THREADS = """
import threading, lestd_kernels
ready, failures = threading.Barrier(2), []

def attempt(statement):
    ready.wait()
    try:
        exec(statement)
    except BaseException as error:
        failures.append(error)

statements = ["import transformers.quantizers.auto", "from lestd_kernels import LestdConfig"]
threads = [threading.Thread(target=attempt, args=(one,)) for one in statements]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
"""
AFTER_A_FAILURE = """
import sys, lestd_kernels
sys.modules["transformers.quantizers.base"] = None
try:
    import transformers.quantizers.auto
except ImportError:
    del sys.modules["transformers.quantizers.base"]
else:
    raise SystemExit("expected a failure")
"""
LOADER_COPIED = """
import copy, inspect, lestd_kernels
import transformers.quantizers.auto as auto
loader = copy.copy(auto.__loader__)
assert loader.get_filename() == auto.__file__
assert "AUTO_QUANTIZER_MAPPING" in inspect.getsource(auto)
"""


def test_the_format_is_registered() -> None:
    cases = (THREADS, AFTER_A_FAILURE, LOADER_COPIED)
    statuses, errors = run_each(*(f"{first}\n{MAPPED}" for first in cases))
    assert dict(zip(cases, statuses, strict=True)) == dict.fromkeys(cases, 0), errors
