#!/bin/sh
# Installs the dependencies into /opt/venv of a container, of the versions in constraints.txt, and the package as it is in
# /opt/cxt. For Dockerfile and apptainer.def, as root in Debian 12.
#
#   EXTRAS     extras of the package (pyproject.toml); all of the workflow if unset
#   PACKAGES   more Debian packages: "gcc libc6-dev python3-dev" for `training: {compile: inductor}`, which GPUs use
#   PIP_…      settings of pip, such as the index that has torch for the CPU only
set -eu
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
cd /opt/cxt
# Dockerfile copies the code after the installation, which only needs to know where it will be.
mkdir -p checkpoints config src/cxt src/snakemake_logger_plugin_cxt
touch src/cxt/__init__.py src/snakemake_logger_plugin_cxt/__init__.py
apt-get update
# shellcheck disable=SC2086 # words
apt-get install --yes --no-install-recommends ca-certificates python3 python3-pip ${PACKAGES:-}
python3 -m venv --without-pip /opt/venv
# pip, because the executors of Kubernetes and AWS Batch begin each job by installing the storage plugin.
python3 -m pip --python /opt/venv/bin/python install --constraint constraints.txt pip --editable ".[${EXTRAS:-all}]"
apt-get purge --yes --auto-remove python3-pip
rm -rf /var/lib/apt/lists/* /root/.cache
