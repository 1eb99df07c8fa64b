"""README.md of this folder, made of the tables in results/. `python examples/reproduce/readme.py` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

from tables import NOT_AT_HAND, RESULTS

from graphlocal import files

README = Path(__file__).parent / "README.md"
PAPERS: dict[str, tuple[str, ...]] = {
    "A. Ororbia, A. Mali, D. Kifer, C. L. Giles: Conducting credit assignment by aligning local representations "
    "(LRA), 2018, arXiv 1803.01834": (
        "lra_steps",
        "lra_initialisation",
        "lra_null",
        "lra_discrete",
        "lra_depth",
        "lra_angle",
        "lra_finetune",
    ),
    "A. Ororbia, A. Mali, D. Kifer, C. L. Giles: Backpropagation-free deep learning with recursive local "
    "representation alignment (rec-LRA), AAAI 2023": (
        "reclra_mnist",
        "reclra_cifar",
        "reclra_confusion",
        "reclra_tsne",
        "imagenet",
    ),
    "G. Marra and others: Local propagation in constraint-based neural networks, 2020": ("lp",),
    "D. Kostadinov and others: Nonlinear transforms with local propagation": ("nlp",),
}
REMARKS = {
    "lp": "Without a stiff constraint (rho=1.0, and etas of 0.3) the variables of the deep net fit the labels by "
    "themselves, and what the net computes falls behind from layer to layer.",
    "lra_depth": "Halting costs no accuracy below a threshold of 0.1, at the whole size either, where samples end up "
    "with half of the layers. That `lra-fdbk` is behind backpropagation at all is most likely due to "
    "this start, at which gradients reach every layer: random feedback has to bring the weights into line with "
    "itself first.",
    "lra_angle": "Rules with random feedback start at right angles to the gradient and turn towards it while the net "
    "learns; `lra-diff`, whose targets come from derivatives, is near it from the first step on. Over ten epochs of "
    "all samples the angles of LRA and rec-LRA open again, and those of feedback alignment don't.",
    "lra_finetune": "From the small start backpropagation learns nothing, not in twenty epochs of all samples either; "
    "after the first half of the epochs by LRA it learns at once, and ends ahead of LRA alone.",
    "lra_steps": "At the small size backpropagation leaves the filters as noise; with K the filters get a shape and "
    "the error falls. At the whole size K = 1 already beats backpropagation, K = 3 and 5 are best, and every even K is "
    "worse: with beta = 1 a step of a target overshoots and the next one goes back, so that an even number of them "
    "ends near where it began. In nets trained with K = 3 or 5 steps don't turn back.",
    "lra_initialisation": "LRA ends nearly alike from every start. Backpropagation is as good or better where "
    "gradients get through, and learns nothing where they don't: from the smallest weights with tanh, and from all of "
    "them with sigmoids.",
    "reclra_mnist": "After so few steps all errors are far above the paper's. Local rules keep up with "
    "backpropagation for units with bounds and lose with ReLU and softplus, whose representations grow in one "
    "direction under random feedback; with signum they win, where backpropagation has an estimator only. The whole "
    "size adds RecLRA with fixed E, difference target propagation and LRA with the paper's normalization.",
    "lra_null": "Backpropagation can't leave the start, because a layer between zero weights gets no gradient; "
    "feedback maps are not zero. Under the paper's normalization every sample pushes as hard as every other, however "
    "wrong it is, and with phi' of a half (softplus, or one winner of four) errors halve from layer to layer. With "
    "`rescale` they keep their size, and every unit does better with one rule and no options, or as well. What is left "
    "of softplus's failure is that it has no upper bound: cut at 6 it learns, as ReLU-6 does better than ReLU (51 %, "
    "one seed).",
    "lra_discrete": "A sign directly on a linear layer leaves the local rules no smooth function to set a target for; "
    "on a tanh they are ahead of the straight-through estimator, and level with the slope-adjusted one. So they are "
    "with Bernoulli units, nearly. On LWTA, whose winners have no upper bound, the paper's normalization "
    "(rescale=None) lets the representations of all samples grow in one direction, see `LRAFeedback`.",
    "reclra_cifar": "Both nets are far from what longer training gives. rec-LRA is seven to eleven points behind, as "
    'said above; fitted feedback (`rule="auto"`, with one step in ten of backpropagation) is within two.',
    "reclra_confusion": "At the small size the means of the classes agree within the spread of the seeds. At the whole "
    "size rec-LRA is 1.8 points behind, most of it on shirts, pullovers and dresses.",
    "reclra_tsne": "Both ways separate the classes in the last hidden layer, alike at the small size, backpropagation "
    "by 1.7 points better at the whole size; the untrained net is no better than the pixels.",
    "imagenet": "In these 72 steps neither learns much. For times, "
    "[step_time_compiled.md](../../benchmarks/results/step_time_compiled.md) has more sizes.",
}
"""What a table shows, or why a number falls short."""
INTRODUCTION = f"""# The papers' tables, reproduced

This file is written by `python examples/reproduce/all.py` from the tables in [results](results); don't edit it.

```
python examples/reproduce/all.py --quick --data-dir DIR      # everything, small; --jobs 2 runs two at a time
python examples/reproduce/lra_null.py --quick --data-dir DIR # one table, small
python examples/reproduce/lra_null.py --data-dir DIR         # the same on all samples and for more epochs: hours
```

DIR holds `MNIST/raw` and `FashionMNIST/raw` as `torchvision.datasets.MNIST(DIR, download=True)` lays them out, and
`cifar10-jpeg` with `train/CLASS/*.jpg` and `test/CLASS/*.jpg`. `imagenet.py --data-dir FOLDER` takes any folder with
`train/CLASS` and `val/CLASS`; its `--quick` makes one up.

Every table has three columns: the paper's number, ours, and backpropagation's here, with the same net, start, batches
and optimizer; mean ± standard deviation over the seeds. "{NOT_AT_HAND}" stands where the paper's number could not be
looked up when the table was made. The small size trains on fewer samples and for fewer epochs than the papers do, so
compare the last two columns with each other.
"""


def section(text: str) -> str:
    """One file of results/, with its title two levels lower and its picture's path from here."""
    return re.sub(r"\]\((?=[\w-]+\.png\))", "](results/", text.strip()).replace("# ", "### ", 1)


def render(results: Path = RESULTS) -> str:
    """The whole file."""
    parts, missing = [INTRODUCTION.strip()], []
    for paper, names in PAPERS.items():
        parts.append(f"## {paper}")
        for name in names:
            found = [results / f"{name}{ending}.md" for ending in ("", "-quick")]
            parts += [section(path.read_text()) for path in found if path.is_file()]
            parts += [REMARKS[name]] if name in REMARKS and found[1].is_file() else []
            if not any(path.is_file() for path in found):
                missing.append(f"`{name}.py`")
    minutes = re.findall(r"--quick` \((\d+\.\d) minutes of one core", "\n".join(parts))
    parts.insert(
        1, f"The {len(minutes)} small tables that say so took {sum(map(float, minutes)):.0f} minutes of one core."
    )
    if missing:
        parts.append("Not measured yet: " + ", ".join(missing) + ".")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    files.write(README, render().encode())
