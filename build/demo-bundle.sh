#!/bin/bash
# demo-bundle.sh DIR [COMMAND]: makes an OCI bundle of a static busybox in DIR.
# Its program prints the guest's kernel, its hostname and its processes, or runs
# COMMAND in a shell.
set -euo pipefail

dir=$1
command=${2:-'echo "kernel:   $(uname -sr)"; echo "hostname: $(hostname)"; echo "processes:"; ps'}

busybox=$(command -v busybox) || {
	echo "demo bundle: no busybox here: make setup installs it" >&2
	exit 1
}
mkdir -p "$dir"
tmp=$(mktemp -d "$dir/.rootfs-XXXXXX")
trap 'rm -rf "$tmp"' EXIT
chmod 0755 "$tmp"
mkdir -p "$tmp"/{bin,dev,etc,proc,root,sys,tmp,var}
chmod 1777 "$tmp/tmp"
install -m 0755 "$busybox" "$tmp/bin/busybox"
while read -r applet; do
	[[ $applet == busybox ]] || ln -s busybox "$tmp/bin/$applet"
done < <("$busybox" --list)
echo 'root:x:0:0:root:/root:/bin/sh' >"$tmp/etc/passwd"
echo 'root:x:0:' >"$tmp/etc/group"
rm -rf "$dir/rootfs"
mv -T "$tmp" "$dir/rootfs"
trap - EXIT

quote() { # a JSON string
	local s=$1
	s=${s//\\/\\\\}
	s=${s//\"/\\\"}
	s=${s//$'\n'/\\n}
	s=${s//$'\t'/\\t}
	printf '"%s"' "$s"
}
cat >"$dir/config.json.tmp" <<EOF
{
  "ociVersion": "1.2.0",
  "process": {
    "user": {"uid": 0, "gid": 0},
    "args": ["/bin/sh", "-c", $(quote "$command")],
    "env": ["PATH=/bin", "HOME=/root", "TERM=xterm"],
    "cwd": "/",
    "noNewPrivileges": true,
    "capabilities": {
      "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_DAC_OVERRIDE"],
      "effective": ["CAP_KILL", "CAP_CHOWN", "CAP_DAC_OVERRIDE"],
      "permitted": ["CAP_KILL", "CAP_CHOWN", "CAP_DAC_OVERRIDE"]
    }
  },
  "root": {"path": "rootfs"},
  "hostname": "runv-demo",
  "mounts": [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
    {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
  ],
  "linux": {
    "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
    "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
    "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
  }
}
EOF
mv "$dir/config.json.tmp" "$dir/config.json"
