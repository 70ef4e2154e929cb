#!/bin/sh
# The command `cdc` of the image: the program with the umask of LAKE_UMASK, and nothing between it and its signals. This
# stands in the path in its place, so that `docker exec` and the health check come through here, too.
set -eu
umask "${LAKE_UMASK:-022}"
exec /opt/cdc/bin/cdc "$@"
