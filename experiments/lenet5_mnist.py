"""LeNet5 on MNIST with 95 and 97 % removed: ``python experiments/lenet5_mnist.py --workers 3``.

The head is factorised too: dense, its 5,010 parameters would be 39 % of the smaller budget.
"""

from _sizes import main

if __name__ == "__main__":
    problem = (("data", "mnist"), ("model", "lenet5"), ("include_head", True))
    main("lenet5_mnist", "LeNet5 on MNIST", problem, (0.05, 0.03), 431_080)
