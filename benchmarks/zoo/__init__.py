"""The zoo: models that nobody here wrote, each compiled and compared with autograd. Run `python -m benchmarks.zoo`."""

from graphlocal.torchvision_operators import declare_operators

declare_operators()  # timm and transformers import torchvision too
