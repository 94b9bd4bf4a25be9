"""Peak memory of fit: bounded by chunk_size, and kept within a limit by chunk_size=None.

The model is a GPT-2 of 4 layers, 128 wide, vocabulary 2,000, with texts of 64 tokens: 1.06 million
parameters, about 15 MB a sample in a chunk.
"""

from __future__ import annotations

import json

import pytest
import torch

from children import run_python
from trak_ext.gradients import memory

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(memory.available_bytes() is None, reason="needs Linux")

SETTING = """
import json, resource, sys, warnings
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
import torch
import trak_ext
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(
    n_embd=128, n_layer=4, n_head=4, n_positions=64, vocab_size=2000,
    bos_token_id=0, eos_token_id=0,
))
ids = torch.randint(0, 2000, (int(sys.argv[2]), 64))
batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
targets = {name: tensor[:2] for name, tensor in batch.items()}

def attributor(chunk_size):
    return trak_ext.Attributor(
        model, "causal_lm", proj_dim=16, progress=False, chunk_size=chunk_size
    )
"""

LIMITED = (
    SETTING
    + """
warnings.simplefilter("error")  # running out of memory would warn
fitted = attributor(int(sys.argv[3]) or None)
fitted.fit([batch])
scores = fitted.attribute([targets])
sample = fitted._features.gradients.sample_bytes({}, targets)
print(json.dumps({"scores": scores.tolist(), "sample": sample}))
"""
)

PEAK = (
    SETTING
    + """
from trak_ext.gradients import GradientComputer

def peak():
    # Not ru_maxrss, which a process begins with that of the one that started it.
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

sample = GradientComputer(model, trak_ext.tasks.get_task("causal_lm")).sample_bytes({}, batch)
attributor(1).fit([targets])  # what libraries take when they are first used
before, growth = peak(), {}
for chunk_size in map(int, sys.argv[3:]):
    attributor(chunk_size).fit([batch])
    growth[chunk_size] = peak() - before
print(json.dumps({"sample": sample, "growth": growth}))
"""
)


def run(code, *arguments, **environment):
    done = run_python(code, *map(str, arguments), check=False, OMP_NUM_THREADS="1", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_fit_finishes_under_2_gib_with_the_same_scores():
    samples = 160
    limited = run(LIMITED, 2 << 30, samples, 0)
    # In one chunk it would not have: the limit is real.
    assert samples * limited["sample"] > 2 << 30
    free = run(LIMITED, 0, samples, 16)
    scores = [torch.tensor(result["scores"]) for result in (limited, free)]
    assert scores[0].shape == (samples, 2)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5 * float(scores[1].abs().max()))


def test_peak_is_bounded_by_chunk_size():
    # A fixed threshold has glibc give freed blocks back; see the next test for its own way.
    found = run(PEAK, 0, 36, 6, 18, MALLOC_MMAP_THRESHOLD_="131072")
    for chunk_size in (6, 18):
        bound = chunk_size * found["sample"]
        assert bound / 2 < found["growth"][str(chunk_size)] <= bound + (16 << 20)


def test_what_the_allocator_keeps_is_no_more_than_half_as_much_again():
    found = run(PEAK, 0, 36, 18)
    assert found["growth"]["18"] <= 1.5 * 18 * found["sample"] + (16 << 20)
