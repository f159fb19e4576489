# The image of apiserver-lb: one static binary, run as nobody in particular.
#
#   docker build --build-arg VERSION="$(git describe --tags --always)" -t apiserver-lb .
#
# BUILD_IMAGE is any image with the Go version of go.mod, /bin/sh and nothing else of note.
ARG BUILD_IMAGE=golang:1.26-bookworm

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
# GOPROXY, where modules come from: for networks that have a proxy of their own.
ARG GOPROXY
ENV CGO_ENABLED=0
# A layer that changes only with the dependencies.
COPY go.mod go.sum ./
RUN go mod download
COPY balancer balancer/
COPY cmd/apiserver-lb cmd/apiserver-lb/
COPY cmd/internal cmd/internal/
COPY configs configs/
COPY health health/
COPY tlsconf tlsconf/
ARG VERSION=unknown
RUN go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=${VERSION}" -o /out/apiserver-lb ./cmd/apiserver-lb

FROM scratch
ARG VERSION=unknown
LABEL org.opencontainers.image.title="apiserver-lb" \
      org.opencontainers.image.description="A load balancer in front of kube-apiservers" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=build /out/apiserver-lb /apiserver-lb
# A number, so that Kubernetes' runAsNonRoot can tell. The mounted key files must be readable by it.
USER 65532:65532
EXPOSE 6443
ENTRYPOINT ["/apiserver-lb"]
CMD ["serve", "--config", "/etc/apiserver-lb/apiserver-lb.yaml"]
