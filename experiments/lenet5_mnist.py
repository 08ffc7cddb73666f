"""LeNet5 on MNIST with 95 and 97 % removed: ``python experiments/lenet5_mnist.py --workers 3``."""

from _sizes import main

if __name__ == "__main__":
    main("lenet5_mnist", "LeNet5 on MNIST", (("data", "mnist"), ("model", "lenet5")), (0.05, 0.03), 431_080)
