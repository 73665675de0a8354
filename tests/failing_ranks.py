"""One rank of test_parallel.py's test_torchrun_ends_with_the_message: torchrun --nproc-per-node 2
tests/failing_ranks.py FAILURE
"""

import sys

from plumbing import parallel
from plumbing.files import UserError


def refuse():
    raise UserError("beta=-1: expected float > 0")


def rank_1_refuses(world):
    return refuse() if world.rank == 1 else parallel.barrier()


FAILURES = {
    "a key that every rank refuses": lambda world: refuse(),
    "rank 0 alone, the others wait for it": lambda world: parallel.main_first(world, refuse),
    "rank 1 alone, rank 0 in a collective": rank_1_refuses,
}

if __name__ == "__main__":
    sys.exit(parallel.run(lambda argv: FAILURES[argv[0]](parallel.init()), sys.argv[1:]))
