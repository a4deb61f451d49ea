#!/usr/bin/env bash
# Uploads to W&B what was recorded offline: oldest first, every piece once. Needs an API key.
#   bash scripts/sync.sh [--all] [FOLDER ...]      default: every run below runs/
# A run that was requeued has a piece for each start, all of one id, and arrives as one run. A piece
# that fails is tried again next time, and the later pieces of its run wait for it. A piece that may
# still be growing waits too, for an hour at most, or not at all with --all.
#
# After a crash a run resumes from its last checkpoint, so the steps since then are in two pieces
# and in W&B twice; metrics.jsonl has them once. If an upload breaks off in the middle of a piece,
# the lines that had arrived arrive again, with the same steps and values: `wandb sync` only
# appends. Ctrl-C breaks off so too.
set -euo pipefail

SAY_EVERY_S=10

all=no
if [ "${1:-}" = --all ]; then
  all=yes
  shift
fi
if [ $# -eq 0 ]; then set -- runs; fi
for folder in "$@"; do
  if [ ! -d "$folder" ]; then
    echo "sync: no folder $folder" >&2
    exit 2
  fi
done
if ! command -v wandb >/dev/null; then
  PATH=$PATH:$(dirname "$0")/../.venv/bin
  if ! command -v wandb >/dev/null; then
    echo "sync: no wandb on the PATH and none in .venv; pip install -r requirements.txt" >&2
    exit 2
  fi
fi

# W&B itself tries for five minutes per piece, silently. Behind a proxy only an upload can tell.
reach() {
  local url host port
  url=${WANDB_BASE_URL:-$(wandb status 2>/dev/null | sed -n 's/.*"base_url": "\([^"]*\)".*/\1/p')}
  url=${url:-https://api.wandb.ai}
  host=${url#*://}
  host=${host%%/*}
  port=443
  case $url in http://*) port=80 ;; esac
  if [ -z "${WANDB_API_KEY:-}${WANDB_IDENTITY_TOKEN_FILE:-}" ] &&
    ! grep -qsF "${host%%:*}" "${NETRC:-$HOME/.netrc}"; then
    no_key
  fi
  case $host in *:*) port=${host##*:} host=${host%:*} ;; esac
  if [ -n "${HTTPS_PROXY:-}${https_proxy:-}${HTTP_PROXY:-}${http_proxy:-}${ALL_PROXY:-}${all_proxy:-}" ] ||
    timeout 10 bash -c "exec 3<>/dev/tcp/$host/$port" 2>/dev/null; then
    return 0
  fi
  echo "sync: $url cannot be reached from here; nothing was sent, the same command tries again" >&2
  exit 1
}
no_key() {
  echo "sync: no API key for W&B; run \`wandb login\` or set WANDB_API_KEY" >&2
  exit 2
}

# offline-run-DATE_TIME-ID: sorted by name, whatever folder they are in.
# A run, or the folder of all, may be a link to another disk: -L.
pieces=$(find -L "${@%/}" -type d -name 'offline-run-*' | sed 's|.*/\(offline-run-[^/]*\)$|\1 &|' | sort | cut -d' ' -f2-)
log=$(mktemp)
sending=
# A background process does not hear Ctrl-C, and would continue to send.
trap 'if [ -n "$sending" ]; then kill "$sending" 2>/dev/null || true; fi; rm -f "$log"' EXIT
sent=0 there=0 waiting=0 failed=0 held=" " reached=no

while IFS= read -r piece; do
  [ -n "$piece" ] || continue
  id=${piece##*-}
  record=$piece/run-$id.wandb
  if [ -e "$record.synced" ]; then
    there=$((there + 1))
    continue
  fi
  if [[ $held == *" $id "* ]]; then # an earlier piece of this run did not arrive
    waiting=$((waiting + 1))
    continue
  fi
  newest=$(find -L "$(dirname "$piece")" -maxdepth 1 -name "offline-run-*-$id" | sort | tail -n 1)
  if [ "$all" = no ] && [ "$piece" = "$newest" ] && [ ! -e "$piece/finished" ] &&
    [ -n "$(find "$record" -mmin -60 2>/dev/null)" ]; then
    echo "$piece: not finished yet; left for later (--all sends it as it is)"
    waiting=$((waiting + 1))
    held="$held$id "
    continue
  fi
  if [ -n "$(find "$record" -mmin -1)" ]; then # W&B's own process may still write its last lines
    size=0
    while now=$(wc -c <"$record") && [ "$now" -ne "$size" ]; do
      size=$now
      sleep 1
    done
  fi
  if [ "$reached" = no ]; then
    reach
    reached=yes
  fi
  exec 9<"$piece"
  if command -v flock >/dev/null && ! flock --nonblock 9; then
    echo "$piece: another sync is sending it; left to that one"
    waiting=$((waiting + 1))
    held="$held$id "
    continue
  fi
  if [ -e "$record.synced" ]; then # by another sync, since it was looked at above
    there=$((there + 1))
    continue
  fi
  # wandb's exit status and its marker say that all is well when the server has refused the data.
  # A record that a kill cut short is complete as it is.
  status=0
  wandb sync "$piece" >"$log" 2>&1 </dev/null 9<&- &
  sending=$!
  SECONDS=0
  while kill -0 "$sending" 2>/dev/null; do
    sleep 0.2
    if [ "$SECONDS" -ge "$SAY_EVERY_S" ]; then
      echo "$piece: still sending: $(tail -n 1 "$log")"
      SECONDS=0
    fi
  done
  wait "$sending" || status=$?
  sending=
  if grep -q 'No API key configured' "$log"; then
    no_key
  fi
  # Lines that only say where its log is do not help.
  errors=$(grep -e ERROR -e '^Error: ' "$log" | grep -v -e 'ends with an incomplete record' \
    -e 'next record: EOF' -e 'Find detailed error logs' || true)
  if [ "$status" -eq 0 ] && [ -z "$errors" ] && grep -q -e 'Finished syncing' -e ERROR "$log"; then
    touch "$record.synced"
    echo "$piece: sent"
    sent=$((sent + 1))
  else
    rm -f "$record.synced"
    echo "$piece: failed: ${errors:-$(tail -n 1 "$log")}" >&2
    failed=$((failed + 1))
    held="$held$id "
  fi
done <<<"$pieces"

echo "$sent sent, $there already there, $waiting waiting, $failed failed"
[ "$failed" -eq 0 ]
