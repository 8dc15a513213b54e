"""The program of a rank of the pool (``ranks.py``): its pipe is its standard input."""

import os
import sys
from multiprocessing.connection import Connection

from tests.support.ranks import serve

if __name__ == "__main__":
    pipe = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    serve(int(sys.argv[1]), pipe, sys.argv[2])
