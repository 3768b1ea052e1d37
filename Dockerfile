# CPU image.
#   docker build -t rudder .
#   docker run -p 8000:8000 --stop-timeout 40 -v rudder-models:/models -v rudder-data:/data rudder
# Stopping waits up to 30 s for running requests (RUDDER_DRAIN_SECONDS): the orchestrator must wait longer before it
# kills, --stop-timeout 40 here, terminationGracePeriodSeconds: 40 in Kubernetes.
FROM rust:1.95-slim-trixie AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked -p rudder && cp target/release/rudder /rudder

FROM debian:trixie-slim
# pip is for the second model source, used where the hub does not answer; curl is for the health check.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home rudder \
    && install -d -o rudder -g rudder /models /data
COPY --from=build /rudder /usr/local/bin/rudder
# By number: Kubernetes cannot tell of a name that it is not root.
USER 10001:10001
ENV RUDDER_HOST=0.0.0.0 RUDDER_CACHE=/models RUDDER_DATA_DIR=/data RUDDER_KV_DIR=/data/kv
VOLUME /models /data
EXPOSE 8000
# The first start downloads the model: until then the container is starting, not unhealthy.
HEALTHCHECK --interval=10s --timeout=3s --start-period=15m --retries=3 \
    CMD curl -fsS http://127.0.0.1:${RUDDER_PORT:-8000}/health || exit 1
ENTRYPOINT ["rudder"]
CMD ["serve"]
