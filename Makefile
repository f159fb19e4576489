# Everything is built and tested from here; `make help` lists it.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS   += --no-print-directory

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X main.version=$(VERSION)
GO_BUILD := CGO_ENABLED=0 go build -trimpath

# More flags of `make demo`, such as --port 7443 where 6443 is taken; see
# `bin/devcluster demo --help`.
DEMOFLAGS ?=
# More flags of `make faults`, such as --faults kill,hang or --only-balancer; see
# `bin/devcluster faults --help`.
FAULTSFLAGS ?=
# More flags of `make soak`, such as --duration 5m or --seed 42, which a run prints so
# that it can be repeated.
SOAKFLAGS ?=
# How long `make fuzz` spends on each target.
FUZZTIME ?= 1m
# `make bench`: how many runs, how long each case is measured (by default it
# takes half an hour), which HAProxy, more flags of cmd/bench, and where the
# report and the plot of it go.
RUNS         ?= 5
DURATION     ?= 5s
HAPROXY      ?= haproxy
BENCHFLAGS   ?=
BENCH_REPORT ?= bin/bench.md
BENCH_PLOT   ?= bin/bench.svg

GOLANGCI_LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.14.0
GOVULNCHECK   := golang.org/x/vuln/cmd/govulncheck@v1.9.0

# The commands of each test target, in the words of cmd/internal/testsum.
# -count=1: tests run other programs, which the cache of go test does not see.
VET   := -- go vet ./... -- go vet -tags image ./cmd/apiserver-lb -- go -C cmd/devcluster vet ./... -- go -C cmd/devcluster/requestinfo vet ./...
UNIT  := -- CGO_ENABLED=1 go test -json -race -count=1 -shuffle=on -timeout 10m ./... \
         -- CGO_ENABLED=1 go -C cmd/devcluster test -json -race -count=1 -timeout 10m . ./cluster/... ./faults/... ./load/... ./peers/... \
         -- go -C cmd/devcluster/requestinfo test -json -count=1 -timeout 5m ./...
IMAGE := -- go test -json -count=1 -timeout 10m -tags image -run '^Test(Image|Release|Systemd)$$' ./cmd/apiserver-lb
# The first run builds etcd and Kubernetes, which takes its time.
E2E   := -- go -C cmd/devcluster test -json -v -count=1 -timeout 55m ./e2e/...
# The core of them with a balancer that may use only what FIPS 140-3 approves.
FIPS  := -- E2E_GODEBUG=fips140=only go -C cmd/devcluster test -json -v -count=1 -timeout 10m -run '^Test(KubectlWhoami|IdentityRows|ClientCASwap|Failover|Exec|RefusedUpgrade)$$' ./e2e

# need PROGRAM PACKAGE WHY installs a Debian package if its program is missing.
define need
@command -v $(1) >/dev/null || { \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing $(2) with apt-get, $(3)"; \
		apt-get update -q >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(2) >/dev/null; \
	else \
		echo "$(1) is missing, $(3): install it (Debian: apt-get install $(2))" >&2; exit 1; \
	fi; }
endef

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/apiserver-lb, a static binary
	$(GO_BUILD) -ldflags '$(LDFLAGS)' -o bin/apiserver-lb ./cmd/apiserver-lb

.PHONY: release
release: ## build dist/: for amd64 and arm64 a tar.gz, a .deb and an SBOM, with checksums
	VERSION="$(VERSION)" configs/package/release

.PHONY: demo
demo: build ## run three real kube-apiservers with the balancer in front, until Ctrl-C
	cd cmd/devcluster && $(GO_BUILD) -o ../../bin/devcluster .
	@exec bin/devcluster demo --balancer bin/apiserver-lb $(DEMOFLAGS)

.PHONY: test
test: bin/testsum need-cc ## run every test: vet, unit, image, e2e against real kube-apiservers, FIPS
	@bin/testsum $(VET) $(UNIT) $(IMAGE) $(E2E) $(FIPS)

.PHONY: test-unit
test-unit: bin/testsum need-cc ## vet and unit tests, with the race detector
	@bin/testsum $(VET) $(UNIT)

.PHONY: test-image
test-image: bin/testsum ## build the Dockerfile with buildah, and a release and its package, and look at them
	@bin/testsum $(IMAGE)

.PHONY: test-e2e
test-e2e: bin/testsum ## tests against real kube-apiservers; the first run builds them
	@bin/testsum $(E2E)

.PHONY: test-fips
test-fips: bin/testsum ## the core of test-e2e with the balancer in FIPS 140-3 mode
	@bin/testsum $(FIPS)

.PHONY: screenshot
screenshot: ## make the picture of the status page in README.md anew
	@E2E_SCREENSHOT=$(CURDIR)/cmd/apiserver-lb/page/page.png go -C cmd/devcluster test -v -count=1 -timeout 10m -run '^TestStatusPage$$' ./e2e

# vulncheck DIR looks for known vulnerabilities in what the module there uses.
define vulncheck
@if ! out=$$(go -C $(1) run $(GOVULNCHECK) ./... 2>&1); then \
	echo "$$out" >&2; \
	case "$$out" in \
	*"fetching vulnerabilities:"*) echo "SKIPPED: known vulnerabilities in $(1), since govulncheck cannot reach its database" >&2;; \
	*) exit 1;; \
	esac; \
fi
endef

.PHONY: fuzz
fuzz: ## fuzz each target for FUZZTIME (1m)
	@for module in . cmd/devcluster cmd/devcluster/requestinfo; do \
		for package in $$(go -C $$module list ./... | grep -v /e2e$$); do \
			for target in $$(go -C $$module test -list '^Fuzz' $$package | grep '^Fuzz' || true); do \
				echo "$$package $$target"; \
				go -C $$module test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 5x $$package; \
			done; \
		done; \
	done

.PHONY: bench
bench: build ## compare with HAProxy, nginx, Caddy and no proxy: CPU, throughput, latency, memory
	go build -o bin/bench ./cmd/bench
	@exec bin/bench -balancer bin/apiserver-lb -haproxy '$(HAPROXY)' -runs $(RUNS) -duration $(DURATION) -o '$(BENCH_REPORT)' -plot '$(BENCH_PLOT)' $(BENCHFLAGS)

.PHONY: attack
attack: build ## attack over HTTP/2, beside HAProxy and a plain Go proxy: what it costs, and what others get
	go build -o bin/bench ./cmd/bench
	@exec bin/bench -attacks -balancer bin/apiserver-lb -haproxy '$(HAPROXY)' $(BENCHFLAGS)

.PHONY: faults
faults: build ## make real kube-apiservers fail behind the balancer and other proxies, and compare
	$(call need,haproxy,haproxy,to compare with)
	$(call need,iptables,iptables,to drop packets in a network namespace)
	$(call need,ss,iproute2,to cut connections in a network namespace)
	cd cmd/devcluster && $(GO_BUILD) -o ../../bin/devcluster .
	@exec bin/devcluster faults --balancer bin/apiserver-lb $(FAULTSFLAGS)

.PHONY: soak
soak: build ## make real kube-apiservers fail at random for 20 minutes, and look for failed requests and leaks
	$(call need,iptables,iptables,to drop packets in a network namespace)
	$(call need,ss,iproute2,to cut connections in a network namespace)
	cd cmd/devcluster && $(GO_BUILD) -o ../../bin/devcluster .
	@exec bin/devcluster soak --balancer bin/apiserver-lb $(SOAKFLAGS)

.PHONY: lint
lint: ## gofmt, go vet, golangci-lint and govulncheck (the first run builds them: minutes)
	@unformatted=$$(gofmt -l balancer cmd configs health tlsconf); \
		if [ -n "$$unformatted" ]; then echo "not formatted with gofmt:"; echo "$$unformatted"; exit 1; fi
	go vet ./...
	go vet -tags image ./cmd/apiserver-lb
	cd cmd/devcluster && go vet ./...
	cd cmd/devcluster/requestinfo && go vet ./...
	go run $(GOLANGCI_LINT) run ./...
	cd cmd/devcluster && go run $(GOLANGCI_LINT) run --config ../../.golangci.yml ./...
	cd cmd/devcluster/requestinfo && go run $(GOLANGCI_LINT) run --config ../../../.golangci.yml ./...
	$(call vulncheck,.)
	$(call vulncheck,cmd/devcluster)

.PHONY: clean
clean: ## remove bin and dist
	rm -rf bin dist

.PHONY: bin/testsum
bin/testsum:
	@go build -o $@ ./cmd/internal/testsum

.PHONY: need-cc
need-cc:
	$(call need,$${CC:-gcc},gcc libc6-dev,since the race detector is linked with it)
