# The relay as a sidecar: one process, one volume, nothing else writable.

FROM python:3.13-slim AS build
# binutils is wanted for `strip` in this stage alone, in whatever version the base has.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY .ci/requirements ./requirements
# Every file that is installed has the hash that was pinned, what builds the wheel included.
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements/build.txt \
    && python -m venv /opt/relay \
    && /opt/relay/bin/pip install --no-cache-dir --no-compile --require-hashes --only-binary :all: -r requirements/image.txt
COPY pyproject.toml README.md ./
COPY relay ./relay
RUN /opt/build/bin/python -m hatchling build -t wheel \
    && /opt/relay/bin/pip install --no-cache-dir --no-compile --no-deps --no-index dist/relay-*.whl \
    && /opt/relay/bin/pip uninstall --yes pip \
    && find /opt/relay -name '*.so*' -type f -exec strip --strip-unneeded {} + \
    && find /opt/relay \( -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h' -o -name '*.pyi' \) -delete \
    && python -m compileall -q /opt/relay/lib

FROM python:3.13-slim
LABEL org.opencontainers.image.title="relay" \
      org.opencontainers.image.description="A webhook sidecar: post an event on localhost, every subscribed endpoint receives it signed."
RUN groupadd --gid 10001 relay \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/relay --shell /usr/sbin/nologin relay \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/relay \
    && install -d -m 0755 /etc/relay
COPY --from=build /opt/relay /opt/relay
ENV PATH=/opt/relay/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/relay
VOLUME /var/lib/relay
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["relay", "healthcheck"]
ENTRYPOINT ["relay"]
CMD ["serve", "--config", "/etc/relay/relay.toml"]
