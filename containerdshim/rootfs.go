package containerdshim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/ocispec"
	"github.com/hyperhq/runv/supervisor"
)

// MountCommand is the hidden command that mounts containerd's mounts in the mount
// namespace in which it is started.
const MountCommand = "mount-rootfs"

const (
	// maxMounts bounds what MountCommand reads.
	maxMounts = 10 << 20
	// maxMountError bounds what of its error is passed on.
	maxMountError = 4 << 10
)

// rootfsDisk says whether the root file system is a file system on an image file
// or a block device, and nothing else: the guest mounts that itself. Nil: this
// host mounts it, whose kernel knows the options that a disk does not have.
func rootfsDisk(mounts []mount.Mount) *ocispec.RootfsDisk {
	if len(mounts) != 1 {
		return nil
	}
	m := mounts[0]
	if !ocispec.DiskFileSystem(m.Type) || m.Target != "" || !filepath.IsAbs(m.Source) {
		return nil
	}
	d := &ocispec.RootfsDisk{Type: m.Type, Source: m.Source}
	for _, o := range m.Options {
		switch o {
		case "ro":
			d.ReadOnly = true
		case "rw":
			d.ReadOnly = false
		case "loop": // what the source is can be seen
		default:
			return nil
		}
	}
	return d
}

// mountRootfs mounts what containerd gives as the root file system, in the shim's
// own mount namespace: its end, however it comes, takes the mounts away.
//
// Their sources are in the namespace host, where containerd may have mounted some
// of them after the shim was started, and nothing says that the shim's namespace
// hears of that. So they are mounted there, by a process of their own because
// containerd's library changes directories and threads, and moved here.
func mountRootfs(ctx context.Context, host *os.File, mounts []mount.Mount, bundle string) (dir string, err error) {
	dir = filepath.Join(bundle, "rootfs")
	if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	var tree int
	if err := supervisor.InMountNS(host, func() error {
		// Of what was mounted before an error, and what has been cloned.
		defer func() { _ = mount.UnmountAll(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) }()
		if err := runMount(ctx, mounts, dir); err != nil {
			return err
		}
		tree, err = unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE|unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return &os.PathError{Op: "open_tree", Path: dir, Err: err}
		}
		return nil
	}); err != nil {
		return "", fmt.Errorf("rootfs: %w", err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return "", fmt.Errorf("rootfs: %w", &os.PathError{Op: "move_mount", Path: dir, Err: err})
	}
	return dir, nil
}

// runMount runs MountCommand in the mount namespace of the calling thread.
func runMount(ctx context.Context, mounts []mount.Mount, dir string) error {
	input, err := json.Marshal(mounts)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, MountCommand, dir)
	cmd.Stdin = bytes.NewReader(input)
	cmd.Dir = "/"
	var text limitedBuffer
	cmd.Stderr = &text
	if err := cmd.Run(); err != nil {
		if said := strings.TrimSpace(text.String()); said != "" {
			return errors.New(said)
		}
		return fmt.Errorf("%s: %w", MountCommand, err)
	}
	return nil
}

// limitedBuffer drops what is too much.
type limitedBuffer struct{ bytes.Buffer }

func (b *limitedBuffer) Write(p []byte) (int, error) {
	b.Buffer.Write(p[:min(len(p), maxMountError-b.Len())])
	return len(p), nil
}

// MountMain is MountCommand: args are the directory, and the mounts come in JSON.
func MountMain(args []string, stdin io.Reader) error {
	if len(args) != 1 {
		return fmt.Errorf("%s is a command of the shim's own", MountCommand)
	}
	var mounts []mount.Mount
	if err := json.NewDecoder(io.LimitReader(stdin, maxMounts)).Decode(&mounts); err != nil {
		return fmt.Errorf("%s: %w", MountCommand, err)
	}
	return mount.All(mounts, args[0])
}

// unmountRootfs takes back mountRootfs.
func unmountRootfs(dir string) {
	if dir == "" {
		return
	}
	if err := mount.UnmountAll(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		log.L.WithError(err).Warnf("unmount %s", dir)
	}
}
