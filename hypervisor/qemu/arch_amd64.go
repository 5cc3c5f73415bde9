package qemu

const hostArch = "amd64"
