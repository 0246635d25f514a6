"""What a likelihood costs, in a sentence for its section: from bench/results, so that no number is written twice."""

import re
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "bench" / "results"

# What each is called in the tables: that of the compiled kernels, which may know it by another name, and that of the CPU.
KERNELS = {
    "bernoulli": "loss forward: bernoulli float32 float32",
    "bernoulli_logits": "loss forward: bernoulli_logits float32 float32",
    "continuous_bernoulli": "loss forward: continuous_bernoulli float32 float32",
    "continuous_bernoulli_logits": "loss forward: continuous_bernoulli_logits float32 float32",
    "mse": "loss forward: mse float32 float32",
    "l1": "loss forward: l1 float32 float32",
    "gaussian": "loss forward: gaussian float32 float32",
    "gaussian_pair": "reconstruction forward: gaussian float32 float32 float32",
    "laplace": "loss forward: laplace float32 float32",
    "student_t": "reconstruction forward: student_t float32 float32 float32",
    "poisson": "loss forward: poisson float32 float32",
    "poisson_log": "loss forward: poisson_log float32 float32",
    "negative_binomial": "reconstruction forward: negative_binomial float32 float32 float32",
    "zero_inflated_negative_binomial": "reconstruction forward: zero_inflated_negative_binomial" + 4 * " float32",
    "discretized_logistic": "reconstruction forward: discretized_logistic float32 float32 float32",
}
ON_A_CPU = {
    "bernoulli": "`bernoulli`, 128x784",
    "bernoulli_logits": "`bernoulli_logits`, 128x784",
    "mse": "`mse`, 128x784",
    "l1": "`l1`, 32x3x64x64",
    "gaussian_pair": "`gaussian`, log scale of each, 128x784",
    "laplace": "`laplace`, log scale of each, 128x784",
    "student_t": "`student_t`, log scale of each, 128x784",
    "continuous_bernoulli_logits": "`continuous_bernoulli_logits`, 128x784",
    "discretized_logistic": "`discretized_logistic`, 32x3x64x64",
    "discretized_logistic_mixture": "`discretized_logistic_mixture`, 8x3x32x32",
    "categorical": "`categorical`, classes last, [32, 64, 1000]",
    "multinomial": "`multinomial`, 500x20108",
    "poisson_log": "`poisson_log`, 128x4000, 10 % above zero",
    "negative_binomial": "`negative_binomial`, 128x4000, theta of genes, 10% above zero",
    "zero_inflated_negative_binomial": "`zero_inflated_negative_binomial`, 128x4000, 10% above zero",
}


def costs() -> dict[str, str]:
    """By likelihood, as `cost_NAME`. A row that the tables no longer have raises."""
    kernels, cpu = rows(RESULTS / "budget.md"), rows(RESULTS / "likelihoods.md")
    found = {}
    for name in KERNELS | ON_A_CPU:
        parts = []
        if name in KERNELS:
            bytes_moved, _, hopper = kernels[KERNELS[name]][:3]
            instructions, _, share = (part.strip("* ") for part in hopper.split("/"))
            bound = "instructions" if float(share) > 1 else "memory"
            parts.append(
                f"On an H100, modelled and not measured: {bytes_moved} bytes and {instructions} instructions an element,"
                f" so {bound} would be the bound."
            )
        if name in ON_A_CPU:
            row = ON_A_CPU[name]
            times = cpu[row][0].replace(" ▼", ", and so slower")
            parts.append(f"On one thread of a CPU, measured: {times} times as fast as the eager formula ({row}).")
        found[f"cost_{name}"] = " ".join(parts)
    return found


def rows(path: Path) -> dict[str, list[str]]:
    """The cells of each row of a table, by the first."""
    lines = re.findall(r"^\| (.*) \|$", path.read_text(), re.MULTILINE)
    return {cells[0]: cells[1:] for cells in (line.split(" | ") for line in lines)}
