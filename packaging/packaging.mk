# Installing, packages, and what a release has to pass. Included by the Makefile.

PREFIX  ?= /usr/local
DESTDIR ?=
BINDIR  ?= $(PREFIX)/bin
# Where plugins go, below: the program looks in `lib` beside its `bin`, and in its triplet's folder and `lib64`.
LIBDIR  ?= $(PREFIX)/lib
MANDIR  ?= $(PREFIX)/share/man
DOCDIR  ?= $(PREFIX)/share/doc/instar
BASHDIR ?= $(PREFIX)/share/bash-completion/completions
ZSHDIR  ?= $(PREFIX)/share/zsh/site-functions
FISHDIR ?= $(PREFIX)/share/fish/vendor_completions.d
# The program reads its configuration here, whatever the prefix is.
CONFDIR := /etc/instar

BUNDLED := parallels qcow qcow2 raw vdi vhdx vmdk vpc
ASSETS  := target/assets
STAGE   := target/stage
DOCS    := $(wildcard docs/*.md docs/*.svg)
SCHEMAS := $(wildcard docs/schemas/*.json)
FORMATS := $(wildcard docs/formats/*.md)
# What the documentation links to and only the sources have: where it is installed, the text of such a link stays.
SOURCES := LICENSE|CHANGELOG\.md|CODE_OF_CONDUCT\.md|GOVERNANCE\.md|MAINTAINERS|CONTRIBUTING\.md|SPECIFICATION\.md|Makefile|Dockerfile|\.github/|packaging/|examples/|guest/|engine/|plugins/|tests/
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
# What plugin writers need, in the order of their dependencies.
CRATES  := instar-guest-abi instar-guest-build instar-guest-sdk instar-plugin-api

# When the sources were last changed: the only date in what is packed. Compilers do not see it: build scripts that watch it
# would run again after each commit.
ifndef SOURCE_DATE_EPOCH
SOURCE_DATE_EPOCH := $(shell git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)
endif
unexport SOURCE_DATE_EPOCH
dated := SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH)

# No folder of this machine gets into what is built. A user's RUSTFLAGS hold instead.
REMAPPED := --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=/cargo --remap-path-prefix=$(CURDIR)=/instar
CARGO_BUILD_RUSTFLAGS := $(strip $(filter-out $(REMAPPED),$(CARGO_BUILD_RUSTFLAGS)) $(REMAPPED))
export CARGO_BUILD_RUSTFLAGS

.PHONY: install uninstall stage-deb stage-rpm deb rpm sbom checksums crates reproducible test-installed container-root mandoc release-check release-tools

# Only copies, so that `sudo make install` needs no tool chain: what `make` has built, or else builds first. A configuration
# that is there is the operator's. Without root there is none to make: a user's own is read from ~/.config.
install: $(if $(wildcard $(ASSETS)/changelog),,instar) ## install below PREFIX (/usr/local), with DESTDIR before it; a PREFIX of your own takes no root
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR)/instar/plugins \
		$(DESTDIR)$(BASHDIR) $(DESTDIR)$(ZSHDIR) $(DESTDIR)$(FISHDIR) $(DESTDIR)$(DOCDIR)/docs/schemas \
		$(DESTDIR)$(DOCDIR)/docs/formats
	install -m 755 $(INSTAR) $(DESTDIR)$(BINDIR)/instar
	install -m 644 $(BUNDLED:%=target/release/libinstar_plugin_%.so) $(DESTDIR)$(LIBDIR)/instar/plugins
	for page in $(ASSETS)/man/*; do \
		install -D -m 644 "$$page" "$(DESTDIR)$(MANDIR)/man$${page##*.}/$${page##*/}"; done
	install -m 644 $(ASSETS)/completions/bash/instar $(DESTDIR)$(BASHDIR)/instar
	install -m 644 $(ASSETS)/completions/zsh/_instar $(DESTDIR)$(ZSHDIR)/_instar
	install -m 644 $(ASSETS)/completions/fish/instar.fish $(DESTDIR)$(FISHDIR)/instar.fish
	install -m 644 README.md SECURITY.md $(ASSETS)/third-party.txt $(DESTDIR)$(DOCDIR)
	install -m 644 $(DOCS) $(DESTDIR)$(DOCDIR)/docs
	install -m 644 $(SCHEMAS) $(DESTDIR)$(DOCDIR)/docs/schemas
	install -m 644 $(FORMATS) $(DESTDIR)$(DOCDIR)/docs/formats
	sed -E -i 's@\[([^]]*)\]\((\.\./)*($(SOURCES))[^)]*\)@\1@g' $(DESTDIR)$(DOCDIR)/*.md $(DESTDIR)$(DOCDIR)/docs/*.md
	case '$(PREFIX)' in /usr|/usr/*) own=;; *) own=1;; esac; \
	if [ -n "$(DESTDIR)" ] || [ "$$(id -u)$$own" = 0 ]; then \
		[ -e $(DESTDIR)$(CONFDIR)/config.toml ] || install -D -m 644 packaging/config.toml $(DESTDIR)$(CONFDIR)/config.toml; fi

uninstall: ## remove what `make install` put there, with the same PREFIX and DESTDIR; a changed configuration stays
	rm -f $(DESTDIR)$(BINDIR)/instar $(BUNDLED:%=$(DESTDIR)$(LIBDIR)/instar/plugins/libinstar_plugin_%.so)
	rm -f $(DESTDIR)$(MANDIR)/man[1-9]/instar.[1-9] $(DESTDIR)$(MANDIR)/man[1-9]/instar-*.[1-9]
	rm -f $(DESTDIR)$(BASHDIR)/instar $(DESTDIR)$(ZSHDIR)/_instar $(DESTDIR)$(FISHDIR)/instar.fish
	rm -rf $(DESTDIR)$(DOCDIR)
	cmp -s packaging/config.toml $(DESTDIR)$(CONFDIR)/config.toml && rm -f $(DESTDIR)$(CONFDIR)/config.toml || true
	for folder in $(LIBDIR)/instar/plugins $(LIBDIR)/instar $(CONFDIR); do \
		rmdir --ignore-fail-on-non-empty $(DESTDIR)$$folder 2>/dev/null || true; done

# --- packages ---------------------------------------------------------------------------------------------------

# What a package holds, as it will lie on the disk: stripped, manual pages and long texts compressed. $(1): the kind,
# $(2): variables for `install`.
define stage
	@rm -rf $(STAGE)/$(1)
	@$(MAKE) --no-print-directory install DESTDIR=$(CURDIR)/$(STAGE)/$(1) PREFIX=/usr $(2) > $(STAGE)-$(1).log || \
		{ cat $(STAGE)-$(1).log >&2; exit 1; }
	@strip --strip-unneeded --remove-section=.comment --remove-section=.note $(STAGE)/$(1)/usr/bin/instar \
		$$(find $(STAGE)/$(1) -name '*.so')
	@find $(STAGE)/$(1)/usr/share/man -type f -exec gzip -9n {} +
	@gzip -9n $(STAGE)/$(1)/usr/share/doc/instar/third-party.txt
endef

deb: instar ## a Debian package, in target/debian
	@$(CARGO) deb --version >/dev/null 2>&1 || $(CARGO) install cargo-deb --locked
	$(call stage,deb,LIBDIR=/usr/lib/x86_64-linux-gnu ZSHDIR=/usr/share/zsh/vendor-completions)
	@gzip -9nc $(ASSETS)/changelog > $(STAGE)/deb/usr/share/doc/instar/changelog.gz
	$(dated) $(CARGO) deb --package instar-cli --no-build --no-strip --quiet

rpm: instar ## an RPM package, in target/generate-rpm
	@$(CARGO) generate-rpm --version >/dev/null 2>&1 || $(CARGO) install cargo-generate-rpm --locked
	$(call stage,rpm,LIBDIR=/usr/lib64)
	@install -D -m 644 LICENSE $(STAGE)/rpm/usr/share/licenses/instar/LICENSE
	$(dated) $(CARGO) generate-rpm --package engine/cli --auto-req builtin

# Installed into target/, once for each version.
CYCLONEDX_VERSION := 0.5.9
CYCLONEDX := target/tools/cargo-cyclonedx-$(CYCLONEDX_VERSION)/bin/cargo-cyclonedx

$(CYCLONEDX):
	$(CARGO) install cargo-cyclonedx --version $(CYCLONEDX_VERSION) --locked \
		--root target/tools/cargo-cyclonedx-$(CYCLONEDX_VERSION) --target-dir target/tools/build

sbom: $(CYCLONEDX) ## what the program and the bundled plugins are made of, as one CycloneDX file: target/instar.cdx.json
	@$(dated) $(PYTHON) packaging/sbom.py $(CYCLONEDX) target/instar.cdx.json $(BUNDLED)

checksums: ## SHA-256 of the packages and the bill of materials that were made, in target/SHA256SUMS
	@cd target && sha256sum debian/*.deb generate-rpm/*.rpm instar.cdx.json | sed 's| [^ ]*/| |' > SHA256SUMS && cat SHA256SUMS

# --- what a release has to pass -----------------------------------------------------------------------------------

# $(1): programs, $(2): Debian packages that have them.
define need
	@if ! command -v $(1) >/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -q && apt-get install -y -q --no-install-recommends $(2); \
		else echo '$@ needs: apt-get install $(2)' >&2; exit 1; fi; fi
endef

crates: ## the crates that plugin writers need, verified offline, in target/package
	@$(CARGO) fetch --locked
	$(CARGO) package --offline $(CRATES:%=-p %)

reproducible: ## two builds of the last commit are byte-identical (two full builds)
	tests/tools/reproducible.sh

test-installed: deb qemu-img ## the .deb in a fresh Debian: installed, used by an ordinary user, purged (root, KVM)
	$(call need,debootstrap,debootstrap)
	$(PYTHON) tests/tools/installed.py target/debian/instar_$(VERSION)_amd64.deb

container-root: instar qemu-img ## the steps of the Dockerfile in a fresh Debian, without a container engine, and a commit in it (root)
	$(call need,debootstrap,debootstrap)
	$(PYTHON) tests/tools/container_root.py

mandoc:
	$(call need,mandoc,mandoc)

# Before anything is installed, the script asks for a clean tree; it installs with `release-tools`.
release-check: ## everything that a release has to pass besides `make test` (more than an hour on two processors; root, KVM); RELEASE_CHECK_ARGS
	$(PYTHON) packaging/release_check.py $(RELEASE_CHECK_ARGS)

release-tools: python qemu-img mandoc
	$(call need,debootstrap,debootstrap)
	$(call need,lintian,lintian)
	$(call need,man,man-db)
	$(call need,rpm,rpm)
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install cargo-deny --locked
	@$(CARGO) deb --version >/dev/null 2>&1 || $(CARGO) install cargo-deb --locked
	@$(CARGO) generate-rpm --version >/dev/null 2>&1 || $(CARGO) install cargo-generate-rpm --locked
	@$(CARGO) semver-checks --version >/dev/null 2>&1 || $(CARGO) install cargo-semver-checks --locked
