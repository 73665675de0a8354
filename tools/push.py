"""Push a finished run to the hub: `python -m tools.push runs/tulu10/dpo org/name`.

Nothing is trained; final/ and adapter/ go as they are.
"""

import argparse
import sys

from plumbing import hub, parallel


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tools.push", description=__doc__)
    parser.add_argument("run", help="out_dir of train_sft.py or train_dpo.py")
    parser.add_argument("repository", help="org/name; created, private, if it does not exist")
    args = parser.parse_args(argv)
    hub.final_of(args.run)
    hub.open_for_push(args.repository)
    hub.push(args.run, args.repository)
    print(f"pushed {args.run} to {args.repository}")
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
