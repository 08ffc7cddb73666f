"""The MLP 784-500-500-500-500-10 on MNIST with 90 % removed: ``python experiments/mlp_mnist.py --workers 3``."""

from _sizes import main

if __name__ == "__main__":
    problem = (("data", "mnist"), ("model", "mlp"), ("hidden", (500, 500, 500, 500)))
    main("mlp_mnist", "MLP 784-500-500-500-500-10 on MNIST", problem, (0.1,), 1_149_010)
