# Sourced by the scripts of this folder.

started=$(date +%s)
say() { echo "[$(($(date +%s) - started)) s] $*"; }

stamped() { # each line of stdin with the seconds since the start of the script before it
  while IFS= read -r line; do echo "[$(($(date +%s) - started)) s] $line"; done
}

tree() { # PID: it and its descendants; torchrun gives each worker a session, so no process group holds them all
  echo "$1"
  for child in $(pgrep -P "$1"); do tree "$child"; done
}

ranks() { # N COMMAND..: python3 COMMAND on N GPUs
  local count=$1
  shift
  if [ "$count" = 1 ]; then python3 "$@"; else python3 -m torch.distributed.run --standalone --nproc-per-node "$count" "$@"; fi
}

wait_for() { # PATTERN FILE: a line of the file; 1 when no child of the script runs any more
  until grep -q -- "$1" "$2" 2> /dev/null; do
    [ -n "$(jobs -rp)" ] || return 1
    sleep 0.2
  done
}
