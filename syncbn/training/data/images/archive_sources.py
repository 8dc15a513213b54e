"""Where the archives of CIFAR and MNIST can be downloaded. Separate, so that a check of settings imports no torch."""

CIFAR = "https://www.cs.toronto.edu/~kriz/"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"


def cifar(name: str) -> str:
    """The address of the archive of "cifar10" or "cifar100"."""
    return f"{CIFAR}{name.replace('cifar', 'cifar-')}-python.tar.gz"
