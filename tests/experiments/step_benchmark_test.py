# SPDX-License-Identifier: Apache-2.0
"""The ratios of the step benchmark, and the losses that it refuses to compare."""

import pytest

from experiments.benchmarks import figures, step

SECONDS = {"weighted_sum": 8.0, "weighted_sum_apart": 8.0, "blur": 8.1, "torch": 9.0}
SECONDS |= {"auto": 4.0, "torch_bfloat16": 5.0}


def runs(**losses):
    """What the child processes print, one of each variant."""
    found = {
        name: [
            {
                "seconds": [seconds, seconds],
                "losses": losses.get(name, [30.0, 9.0]),
                "peak_gb": 5.0 if name.startswith("torch") else 3.0,
                "temporaries_gb": 1.0,
                "compute_dtype": "bfloat16" if name == "auto" else "float32",
            }
        ]
        for name, seconds in SECONDS.items()
    }
    return found | {"matmul": [{"gflops": {"8x8x8": 1.0}}]}


def test_auto_is_compared_with_torchs_faster_dtype():
    result = step._summary(runs(auto=[30.5, 7.0]))
    ratios = result["ratios"]
    assert ratios["auto_tokens_per_second_over_torchs_best"] == 5 / 4
    assert ratios["auto_tokens_per_second_over_float32"] == 2
    assert ratios["auto_peak_over_torch_bfloat16"] == ratios["peak_over_torch"] == 0.6
    assert result["auto_dtype"] == "bfloat16"
    row = figures._step(result)
    assert "in bfloat16" in row and "1.25 times those of torch's faster dtype" in row


@pytest.mark.parametrize(
    "losses",
    [
        {"torch": [30.0, 9.1]},
        {"auto": [32.0, 9.0]},
        {"torch_bfloat16": [28.0, 9.0]},
    ],
)
def test_variants_of_different_losses_are_not_compared(losses):
    with pytest.raises(SystemExit, match="different losses"):
        step._summary(runs(**losses))
