#!/usr/bin/env bash
# Runs a command beside a private Postgres server: scripts/with-postgres.sh cargo test
#
# With NUDGED_TEST_POSTGRES_URL set it only runs the command. Otherwise it makes a cluster in a temporary directory,
# starts it on a free loopback port with a random password, exports the variable, and removes everything afterwards.
# The server's programs are looked for in PATH and where Debian, Fedora and Homebrew put them; as root on a Debian they
# are installed when missing. The exit status is the command's.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: $0 COMMAND [ARGUMENT…]" >&2
    exit 2
fi
if [ -n "${NUDGED_TEST_POSTGRES_URL:-}" ]; then
    exec "$@"
fi

# initdb, pg_ctl and postgres lie together; the newest version wins.
find_programs() {
    local directory
    for directory in $(ls -d /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql*/bin \
        /usr/local/opt/postgresql*/bin 2>/dev/null | sort -rV) \
        "$(dirname "$(command -v initdb 2>/dev/null || echo /nowhere/initdb)")"; do
        if [ -x "$directory/initdb" ] && [ -x "$directory/pg_ctl" ] && [ -x "$directory/postgres" ]; then
            echo "$directory"
            return
        fi
    done
}

programs=$(find_programs)
if [ -z "$programs" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "with-postgres: installing Debian's package postgresql" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2
    apt-get install -y -qq --no-install-recommends postgresql >&2
    programs=$(find_programs)
fi
if [ -z "$programs" ]; then
    echo "with-postgres: no Postgres server found. Install it (Debian: apt-get install postgresql)," >&2
    echo "or set NUDGED_TEST_POSTGRES_URL=postgres://user:password@host/database to one that tests may fill." >&2
    exit 1
fi

directory=$(mktemp -d "${TMPDIR:-/tmp}/nudged-postgres.XXXXXX")
password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')

# Postgres refuses to run as root.
as_server() { "$@"; }
if [ "$(id -u)" = 0 ]; then
    server_user=postgres
    id postgres >/dev/null 2>&1 || server_user=nobody
    chown "$server_user" "$directory"
    as_server() { (cd "$directory" && exec setpriv --reuid="$server_user" --regid="$(id -g "$server_user")" \
        --clear-groups env HOME="$directory" "$@"); }
fi

command_pid=
finish() {
    status=$?
    trap - EXIT INT TERM HUP
    if [ -n "$command_pid" ]; then
        kill "$command_pid" 2>/dev/null || true
    fi
    as_server "$programs/pg_ctl" -D "$directory/data" -m immediate -w stop >/dev/null 2>&1 || true
    rm -rf "$directory"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

printf '%s' "$password" | as_server tee "$directory/password" >/dev/null
as_server "$programs/initdb" -D "$directory/data" -U nudged --auth=scram-sha-256 --pwfile="$directory/password" \
    --encoding=UTF8 --locale=C --no-sync >"$directory/initdb.log" 2>&1 || { cat "$directory/initdb.log" >&2; exit 1; }

# A port is free only once it is bound: try some. The cluster is thrown away, so nothing needs to reach the disk.
started=
for _ in 1 2 3 4 5 6 7 8 9 10; do
    port=$((20000 + $(od -An -N2 -tu2 /dev/urandom) % 40000))
    options="-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories='' -c fsync=off"
    options="$options -c full_page_writes=off -c max_connections=100"
    if as_server "$programs/pg_ctl" -D "$directory/data" -l "$directory/server.log" -o "$options" -w -t 60 start \
        >/dev/null 2>&1; then
        started=yes
        break
    fi
done
if [ -z "$started" ]; then
    cat "$directory/server.log" >&2
    echo "with-postgres: the server does not start" >&2
    exit 1
fi

export NUDGED_TEST_POSTGRES_URL="postgres://nudged:$password@127.0.0.1:$port/postgres"
# In the background and waited for, so that a signal ends both the command and the server.
"$@" <&0 &
command_pid=$!
status=0
wait "$command_pid" || status=$?
command_pid=
exit "$status"
