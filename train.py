"""Train one network: ``python train.py [group=choice] [setting=value] ...``; ``python train.py --help`` lists them.

It is the same program as ``syncbn train``, from a checkout.
"""

from syncbn.training import standard_streams
from syncbn.training.distributed import signals

if __name__ == "__main__":  # before all other imports, which take seconds
    signals.begin()
    standard_streams.outlive_reader()

from syncbn.train import main

if __name__ == "__main__":
    main()
