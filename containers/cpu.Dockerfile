# The pipeline on a machine without GPUs: the environment of `make env`, and this checkout in /d2o.
#
#     docker build -f containers/cpu.Dockerfile -t d2o:cpu .
#     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/d2o" d2o:cpu snakemake --cores all
#
# With a checkout mounted over /d2o its code and config are used, and results/ outlives the container.
FROM python:3.11-slim-bookworm

# DeepSpeed and torch compile kernels when they run; vLLM loads libnuma.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*

# Any user id: one that /etc/passwd does not know has neither a name nor a home.
ENV PATH=/opt/d2o/bin:$PATH HOME=/tmp USER=d2o
WORKDIR /d2o
RUN python -m venv /opt/d2o && ln -s /opt/d2o .venv && pip install --no-cache-dir uv

# As much of the checkout as the install reads: an edit of the rest installs nothing again.
COPY pyproject.toml README.md ./
COPY workflow/d2o/__init__.py workflow/d2o/
COPY envs/install.sh envs/cpu.lock.txt envs/
RUN UV_NO_CACHE=1 envs/install.sh cpu

COPY . .
RUN chmod a+w . results
CMD ["snakemake", "--cores", "all"]
