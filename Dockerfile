# docker build -t ffcv-convnext . && docker run --rm ffcv-convnext
FROM python:3.11-slim-bookworm

# What FFCV is built with, and make and git for the Makefile's commands.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libopencv-dev libturbojpeg0-dev make pkg-config \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /ffcv_convnext
COPY . .
RUN make setup

CMD ["make", "demo"]
