# One image a target, for processors alone; state, and nothing else, is in /data:
#
#   docker build --target studio -t qrlora-studio .    # the editor in the browser, port 8765
#   docker build --target serve -t qrlora-serve .      # OpenAI's images endpoint, port 8000
#
# docs/serve.md says how they are run.
FROM python:3.12-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/qrlora
WORKDIR /source
COPY constraints.txt ./
# The default index's torch brings the libraries of graphics cards: 3 GB more.
RUN /opt/qrlora/bin/pip install -c constraints.txt --no-deps --index-url "$TORCH_INDEX" torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/qrlora/bin/pip install -c constraints.txt '.[studio]'

FROM python:3.12-slim-bookworm AS runtime
COPY --from=build /opt/qrlora /opt/qrlora
# The registry, keys and caches are by default in the home of whoever runs the command: here in the volume.
RUN useradd --uid 10001 --create-home --home-dir /data qrlora && install -d -o qrlora -g qrlora /data/adapters
ENV PATH=/opt/qrlora/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /data
VOLUME /data
STOPSIGNAL SIGTERM

FROM runtime AS serve
EXPOSE 8000
HEALTHCHECK --start-period=120s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["qrlora", "serve", "--host", "0.0.0.0", "--port", "8000", "--adapters", "/data/adapters"]

FROM runtime AS studio
EXPOSE 8765
HEALTHCHECK --start-period=120s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8765/health', timeout=5)"]
ENTRYPOINT ["qrlora", "studio", "--host", "0.0.0.0", "--port", "8765", "--no-browser"]
