# The command line, on a CPU:
#     docker build --tag autogaze .
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/videos" autogaze prune video.mp4 -o pruned
# On a CUDA GPU, whose driver and container toolkit the host has; torch brings the rest of CUDA:
#     docker build --tag autogaze:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#     docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:/videos" autogaze:cuda prune video.mp4 --device cuda -o pruned
ARG PYTHON_VERSION=3.13
FROM python:${PYTHON_VERSION}-slim

# The index of the torch build, and extras of the package such as [train,evaluate].
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=""

RUN pip install --no-cache-dir torch --index-url "${TORCH_INDEX}"
COPY . /package
RUN pip install --no-cache-dir "/package${EXTRAS}" && rm -r /package

# Files written to /videos belong to the user that --user names, root by default; models from the Hub are kept beside them.
ENV HF_HOME=/videos/.cache/huggingface
WORKDIR /videos
ENTRYPOINT ["autogaze"]
CMD ["--help"]
