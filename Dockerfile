# A machine that has built anabranch and can test it, by the commands that continuous integration runs:
#
#   docker build -t anabranch .
#   docker run --shm-size=2g anabranch                      # every test, as continuous integration
#   docker run --shm-size=2g anabranch launch/train.sh      # the README's first run
#
# For the CPU: nvcc is not in it. Kernels are compiled too in an image of Debian's kind that has nvcc: --build-arg BASE=...
ARG BASE=debian:12-slim
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /anabranch

# Git for the tests, certificates for what is fetched.
# hadolint ignore=DL3008
RUN apt-get -qq update && apt-get -qq install --yes --no-install-recommends ca-certificates git && rm -rf /var/lib/apt/lists/*

# Compilers, libraries and .venv, made anew where these files change.
COPY launch launch
RUN launch/setup.sh --tests --slurm && rm -rf /var/lib/apt/lists/* /root/.cache

COPY . .
# -N: sets up and builds everything, then only lists the tests.
RUN CI=true launch/test.sh --slurm -N
ENV CI=true
CMD ["bash", ".ci/run"]
