"""The zoo: models that nobody here wrote, each compiled and compared with autograd. Run `python -m benchmarks.zoo`."""
