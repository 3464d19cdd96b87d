# The pipeline on a machine with NVIDIA GPUs, their driver and the NVIDIA Container Toolkit: the environment of
# `make env LOCK=gpu`, and this checkout in /d2o. Not run where it was written.
#
#     docker build -f containers/gpu.Dockerfile -t d2o:gpu .
#     docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/d2o" d2o:gpu snakemake --cores all
#
# With a checkout mounted over /d2o its code and config are used, and results/ outlives the container.
FROM python:3.11-slim-bookworm

# DeepSpeed, torch and triton compile kernels when they run; CUDA comes with the lock.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# Any user id: one that /etc/passwd does not know has neither a name nor a home.
ENV PATH=/opt/d2o/bin:$PATH HOME=/tmp USER=d2o
WORKDIR /d2o
RUN python -m venv /opt/d2o && ln -s /opt/d2o .venv && pip install --no-cache-dir uv

# As much of the checkout as the install reads: an edit of the rest installs nothing again.
COPY pyproject.toml README.md ./
COPY workflow/d2o/__init__.py workflow/d2o/
COPY envs/install.sh envs/gpu.lock.txt envs/
RUN UV_NO_CACHE=1 envs/install.sh gpu

COPY . .
RUN chmod a+w . results
CMD ["snakemake", "--cores", "all"]
