#!/usr/bin/env bash
# Sourced by the other scripts: Ray's token stands in a file that only its owner can read. Made where there is none;
# all machines of a cluster need the same. RAY_AUTH_TOKEN_PATH says where (~/.ray/auth_token).
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"

make_token() {
  local old
  old=$(umask)
  umask 077
  mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
  if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"
  fi
  chmod 600 "$RAY_AUTH_TOKEN_PATH"
  umask "$old"
}

need_token() {
  if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    echo "no Ray token at $RAY_AUTH_TOKEN_PATH: copy it from the head (scp -p), or set RAY_AUTH_TOKEN_PATH" >&2
    return 2
  fi
  chmod 600 "$RAY_AUTH_TOKEN_PATH"
}
