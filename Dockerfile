# The consumer. Warehouse and change log lie in /lake; everything else comes by CDC_ settings.
#
#     docker build --tag pg-duckdb-cdc .
#     docker run --init --env CDC_DSN=postgresql://cdc@db.example.com/shop --volume "$PWD/lake:/lake" pg-duckdb-cdc

ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /src
RUN python -m venv /opt/cdc
COPY pyproject.toml README.md LICENSE ./
COPY cdc cdc
COPY postgres/init postgres/init
# the extra is empty where pgoutput-decoder has no wheel: anywhere but on x86-64
RUN /opt/cdc/bin/pip install --no-cache-dir '.[debezium]'

FROM python:${PYTHON}-slim
ARG LAKE_UID=1000
ARG LAKE_GID=1000
# --non-unique: the host's number may be one that the image uses as well
RUN groupadd --non-unique --gid "${LAKE_GID}" cdc \
    && useradd --non-unique --uid "${LAKE_UID}" --gid "${LAKE_GID}" --no-create-home --home-dir /lake cdc \
    && install --directory --owner="${LAKE_UID}" --group="${LAKE_GID}" /lake
COPY --from=build /opt/cdc /opt/cdc
COPY --chmod=755 docker/entrypoint.sh /usr/local/bin/cdc

# a user of another number (docker run --user) has no entry in /etc/passwd, and a home all the same
ENV HOME=/lake \
    CDC_WAREHOUSE=/lake/warehouse.duckdb \
    CDC_HISTORY=/lake/history \
    LAKE_UMASK=022
WORKDIR /lake
# by number, which others can tell from root's
USER ${LAKE_UID}:${LAKE_GID}
# the lag counts from the last moment that the warehouse has seen, idle or not
HEALTHCHECK --interval=30s --timeout=30s --retries=3 --start-period=60s CMD ["cdc", "status", "--max-lag", "60s"]
ENTRYPOINT ["cdc"]
CMD ["run"]
