# Installs walferry as systemd services expect it: `make`, then `sudo make install`. PREFIX and DESTDIR as usual.
PREFIX ?= /usr
DESTDIR ?=
CARGO_TARGET_DIR ?= target
BINARY = $(CARGO_TARGET_DIR)/release/walferry

.PHONY: all install uninstall nightly nightly-simulator nightly-crashes nightly-power nightly-ktls nightly-soak nightly-fuzz
# The long tests measure: one at a time.
.NOTPARALLEL:

all:
	cargo build --release

# Builds only what is missing: root often has no cargo.
$(BINARY):
	cargo build --release

install: $(BINARY)
	install -Dm755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/walferry
	install -Dm644 systemd/walferry@.service $(DESTDIR)$(PREFIX)/lib/systemd/system/walferry@.service
	install -Dm644 systemd/walferry-witness@.service $(DESTDIR)$(PREFIX)/lib/systemd/system/walferry-witness@.service
	install -Dm644 systemd/walferry.sysusers.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/walferry.conf
	install -Dm644 systemd/walferry.tmpfiles.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/walferry.conf
	install -Dm644 systemd/walferry.toml $(DESTDIR)$(PREFIX)/share/walferry/walferry.toml
	install -Dm644 README.md $(DESTDIR)$(PREFIX)/share/doc/walferry/README.md
	# Not in a packaging root: there the package manager's hooks do this.
	[ -n "$(DESTDIR)" ] || ! command -v systemd-sysusers >/dev/null || systemd-sysusers
	[ -n "$(DESTDIR)" ] || ! command -v systemd-tmpfiles >/dev/null || systemd-tmpfiles --create walferry.conf
	[ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/walferry
	rm -f $(DESTDIR)$(PREFIX)/lib/systemd/system/walferry@.service
	rm -f $(DESTDIR)$(PREFIX)/lib/systemd/system/walferry-witness@.service
	rm -f $(DESTDIR)$(PREFIX)/lib/sysusers.d/walferry.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/walferry.conf
	rm -rf $(DESTDIR)$(PREFIX)/share/walferry $(DESTDIR)$(PREFIX)/share/doc/walferry

# The long tests, about three hours on two cores; TESTING.md tells what each is for. Needs root, QEMU, a nightly toolchain and
# cargo-fuzz; what cannot run says why. One that fails does not keep the next from running: `make nightly-power` runs it again.
nightly:
	$(MAKE) --keep-going nightly-simulator nightly-crashes nightly-power nightly-ktls nightly-soak nightly-fuzz

nightly-simulator:
	cargo run --release -p sim -- --seeds 1000000 --minutes 15
	cargo run --release -p sim -- --mutant all

nightly-crashes:
	WALFERRY_CRASH_ROUNDS=200 cargo test -p walferry --test kill -- --nocapture
	cargo test -p walferry --test sweep -- --include-ignored

nightly-power:
	cargo build --release
	cargo run --release -p walferry-power -- loss --on-host
	cargo run --release -p walferry-power -- loss --on-host --filesystem ext4 --cuts 30 --flush-by dsync --bus scsi
	cargo run --release -p walferry-power -- loss --on-host --filesystem ext4 --cuts 20 --flush-by fdatasync --members
	cargo run --release -p walferry-power -- faults --on-host
	cargo run --release -p walferry-power -- faults --on-host --filesystem xfs

nightly-ktls:
	cargo build --release
	cargo run --release -p walferry-power -- ktls

nightly-soak:
	cargo run --release -- drill --soak 30min

nightly-fuzz:
	fuzz/run 300
