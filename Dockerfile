# instar in a container, as an ordinary user and without /dev/kvm. docs/operations.md says how to run it.
#
#     docker build -t instar .
#     docker run --rm --network none --cap-drop all --user "$(id -u):$(id -g)" -v "$PWD:/images" instar commit top.qcow2
#
# `make container-root` follows these steps without a container engine, in a Debian of debootstrap: tests/tools/dockerfile.py
# reads them.

# The rust-version of Cargo.toml, and the Debian that both stages are of.
ARG RUST=1.90
ARG SUITE=bookworm

FROM docker.io/library/rust:${RUST}-slim-${SUITE} AS build
RUN apt-get update -q && apt-get install -y -q --no-install-recommends make
WORKDIR /src
COPY . .
RUN make install DESTDIR=/stage PREFIX=/usr LIBDIR=/usr/lib/x86_64-linux-gnu
RUN strip --strip-unneeded /stage/usr/bin/instar /stage/usr/lib/x86_64-linux-gnu/instar/plugins/*.so
RUN gzip -9n /stage/usr/share/doc/instar/third-party.txt

FROM docker.io/library/debian:${SUITE}-slim
# No manual pages, no completions: what runs, and the licences of what is in it.
COPY --from=build /stage/usr/bin/instar /usr/bin/instar
COPY --from=build /stage/usr/lib/x86_64-linux-gnu/instar /usr/lib/x86_64-linux-gnu/instar
COPY --from=build /stage/usr/share/doc/instar/third-party.txt.gz /usr/share/doc/instar/third-party.txt.gz
COPY packaging/copyright /usr/share/doc/instar/copyright
COPY packaging/container.toml /etc/instar/config.toml
# A number, so that Kubernetes can see that it is not root's (runAsNonRoot). Another one works as well: no file is this user's.
USER 65532:65532
WORKDIR /images
ENTRYPOINT ["instar"]
CMD ["--help"]
