# Everything a person or CI does with this repository. `make help` lists it.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
DESTDIR    ?=
GO         ?= go

BINDIR     := $(PREFIX)/bin
LIBEXECDIR := $(PREFIX)/libexec/runv
DATADIR    := $(PREFIX)/share

ROOT  := $(CURDIR)
CACHE := $(ROOT)/.cache
RUNV  := $(ROOT)/bin/runv

# Release and commit, as `runv --version` prints them.
VERSION ?= $(shell git describe --tags --match 'v[0-9]*' 2>/dev/null | sed s/^v// | grep . || echo 0.1.0-dev)
COMMIT  ?= $(shell git describe --always --dirty --abbrev=12 --exclude '*' 2>/dev/null)
PKG     := github.com/hyperhq/runv
LDFLAGS := -s -w -X $(PKG)/version.Version=$(VERSION) -X $(PKG)/version.Commit=$(COMMIT) -X main.version=$(VERSION)
# The version comes from LDFLAGS; git may refuse a checkout that is somebody else's.
export GOFLAGS := $(strip $(filter-out -buildvcs=%,$(GOFLAGS)) -buildvcs=false)
# The agent's goroutines are short. Without KVM a signal costs more than it saves,
# and code that runs for the first time is slow enough for many of them. A guest's
# processors do not change, so the runtime need not look for a change.
AGENTFLAGS := -X runtime.godebugDefault=asyncpreemptoff=1,updatemaxprocs=0,containermaxprocs=0
GOBUILD := CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)'

# What the tests that boot VMs use. A test that misses one of them skips itself
# and says so, unless RUNV_TEST_MUST is set.
export RUNV_BIN         ?= $(RUNV)
export RUNV_TEST_KERNEL ?= $(CACHE)/guest/kernel
export RUNV_TEST_INITRD ?= $(CACHE)/guest/initrd.img

FUZZTIME ?= 20s
DEMO     ?=
BENCH    ?=
CLIENTS  ?=
PEER     ?=

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Build

.PHONY: build
build: ## Build bin/runv, the static bin/runv-agent and containerd's shim
	@mkdir -p bin
	$(GOBUILD) -o bin/runv .
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS) $(AGENTFLAGS)' -o bin/runv-agent ./cmd/runv-agent
	$(GOBUILD) -o bin/containerd-shim-runv-v2 ./cmd/containerd-shim-runv-v2

.PHONY: setup
setup: ## Install the system packages that are missing (as root)
	@build/setup.sh

.PHONY: guest
guest: build ## Assemble the guest image in .cache/guest
	@$(RUNV) manage build-guest --output $(CACHE)/guest

.PHONY: guest-kernel
guest-kernel: ## Build the optional small kernel from the distribution's source package
	@build/guest-kernel.sh $(CACHE)/guest-kernel

.PHONY: run
run: setup guest ## Run a container of a demo bundle in a VM; DEMO='command' replaces its program
	@build/demo-bundle.sh $(CACHE)/demo $(if $(DEMO),'$(subst ','\'',$(DEMO))')
	@$(RUNV) --root $(CACHE)/demo-state --kernel $(RUNV_TEST_KERNEL) --initrd $(RUNV_TEST_INITRD) \
	    run --bundle $(CACHE)/demo demo-$$$$

##@ Check

.PHONY: test
test: setup guest ## Run every test: unit with the race detector, end to end, OCI validation
	@RUNV_TEST_MUST=1 $(MAKE) --no-print-directory race
	@$(MAKE) --no-print-directory integration
	@$(MAKE) --no-print-directory validate

.PHONY: unit
unit: ## Run the unit tests
	$(GO) test $$(build/packages.sh unit)

.PHONY: race
race: ## Run the unit tests with the race detector
	CGO_ENABLED=1 $(GO) test -race -timeout 10m $$(build/packages.sh unit)

.PHONY: integration
integration: guest ## Run the end-to-end tests against the built binaries (as root)
	@build/systemd-rootfs.sh $(CACHE)/systemd
	RUNV_TEST_MUST=1 $(GO) test -count=1 -timeout 15m ./tests/...

# The suite's checksum is not in tests/shim/go.sum: whoever runs it has Go ask the
# checksum database for it.
.PHONY: shimtest
shimtest: guest ## Run containerd's conformance suite for shims (as root)
	cd tests/shim && RUNV_TEST_MUST=1 $(GO) test -mod=mod -count=1 -timeout 15m ./...

.PHONY: validate
validate: guest ## Run the OCI runtime-tools validation beside runc and crun (as root)
	cd tests/oci && $(GO) run .

.PHONY: test-clients
test-clients: setup guest ## Use runv as its clients do (as root); CLIENTS='podman' selects, PEER=none compares with nothing
	@CLIENTS_PEER='$(PEER)' build/test-clients.sh $(CLIENTS)

.PHONY: bench
bench: guest ## Measure runv beside runc, crun and runsc (as root); BENCH='--quick' or other flags
	@tests/bench/setup.sh
	@mkdir -p $(CACHE)/bin
	@CGO_ENABLED=0 $(GO) build -o $(CACHE)/bin/runv-bench ./tests/bench
	@$(CACHE)/bin/runv-bench --runv $(RUNV_BIN) --kernel $(RUNV_TEST_KERNEL) --initrd $(RUNV_TEST_INITRD) $(BENCH)

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME (20s)
	@build/fuzz.sh $(FUZZTIME)

.PHONY: lint
lint: ## Check formatting, style and the arrows between packages
	@build/lint.sh

.PHONY: vet-arm64
vet-arm64: ## Build and vet everything for arm64
	GOARCH=arm64 CGO_ENABLED=0 $(GO) build ./...
	GOARCH=arm64 CGO_ENABLED=0 $(GO) vet ./...

##@ Generate

.PHONY: proto
proto: ## Generate the Go code of the protocols
	@build/proto.sh $(ROOT)

.PHONY: check-proto
check-proto: ## Fail if the generated code does not match the protocols
	@build/check-proto.sh

.PHONY: man
man: build ## Write the man pages to .cache/man
	@mkdir -p $(CACHE)/man
	$(RUNV) man $(CACHE)/man

.PHONY: completion
completion: build ## Write the shell completions to .cache/completion
	@mkdir -p $(CACHE)/completion
	@for s in bash zsh fish; do $(RUNV) completion $$s >$(CACHE)/completion/runv.$$s; done

##@ Install

.PHONY: install
install: build man completion ## Install below DESTDIR and PREFIX (/usr/local)
	install -D -m 0755 bin/runv $(DESTDIR)$(BINDIR)/runv
	install -D -m 0755 bin/containerd-shim-runv-v2 $(DESTDIR)$(BINDIR)/containerd-shim-runv-v2
	install -D -m 0755 bin/runv-agent $(DESTDIR)$(LIBEXECDIR)/runv-agent
	install -D -m 0644 config/config.toml.example $(DESTDIR)$(SYSCONFDIR)/runv/config.toml.example
	install -d $(DESTDIR)$(DATADIR)/man/man8
	install -m 0644 $(CACHE)/man/*.8 $(DESTDIR)$(DATADIR)/man/man8
	install -D -m 0644 $(CACHE)/completion/runv.bash $(DESTDIR)$(DATADIR)/bash-completion/completions/runv
	install -D -m 0644 $(CACHE)/completion/runv.zsh $(DESTDIR)$(DATADIR)/zsh/site-functions/_runv
	install -D -m 0644 $(CACHE)/completion/runv.fish $(DESTDIR)$(DATADIR)/fish/vendor_completions.d/runv.fish

.PHONY: uninstall
uninstall: ## Remove what install put there; the configuration and the guest image stay
	rm -f $(DESTDIR)$(BINDIR)/runv $(DESTDIR)$(BINDIR)/containerd-shim-runv-v2 $(DESTDIR)$(SYSCONFDIR)/runv/config.toml.example
	rm -rf $(DESTDIR)$(LIBEXECDIR)
	rm -f $(DESTDIR)$(DATADIR)/man/man8/runv*.8
	rm -f $(DESTDIR)$(DATADIR)/bash-completion/completions/runv
	rm -f $(DESTDIR)$(DATADIR)/zsh/site-functions/_runv
	rm -f $(DESTDIR)$(DATADIR)/fish/vendor_completions.d/runv.fish

.PHONY: clean
clean: ## Remove what was built here: bin and .cache
	rm -rf bin .cache
