package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/golang/glog"
)

// A snapshot is bound to the contents of QEMU, kernel and initrd, but hashing
// 70 MB takes longer than a clone. So a file is hashed once, and the hash is
// remembered by what the kernel says of the file: device, inode, size, the time
// of its last change of contents and that of its last change at all. Nobody can
// change a file and keep the last one without setting the host's clock.

// fileID is a file as the kernel knows it.
type fileID struct {
	dev, ino, size, mtime, ctime int64
}

func identify(fi os.FileInfo) (fileID, error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.Mode().IsRegular() {
		return fileID{}, errors.New("it is not a regular file")
	}
	return fileID{
		dev: int64(st.Dev), ino: int64(st.Ino), size: st.Size,
		mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano(),
	}, nil
}

func identifyOpen(f *os.File) (fileID, error) {
	fi, err := f.Stat()
	if err != nil {
		return fileID{}, err
	}
	id, err := identify(fi)
	if err != nil {
		return fileID{}, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return id, nil
}

// name of the cache's file for it.
func (i fileID) name() string {
	s := "sha256"
	for _, n := range []int64{i.dev, i.ino, i.size, i.mtime, i.ctime} {
		s += "-" + strconv.FormatInt(n, 36)
	}
	return s
}

// identity is what a file is.
type identity struct {
	SHA256 string `json:"sha256"`
	// Version is QEMU's, empty for other files.
	Version string `json:"version,omitempty"`
}

// identities remembers them, in memory and in a directory that survives the
// process but not the boot.
type identities struct {
	// dir is empty if nothing is kept there.
	dir string

	mu    sync.Mutex
	known map[fileID]identity // guarded by mu
}

// of returns what the file at path is. version, which may be nil, is asked once
// for a file.
func (c *identities) of(ctx context.Context, path string, version func(context.Context) (string, error)) (identity, fileID, error) {
	f, err := os.Open(path)
	if err != nil {
		return identity{}, fileID{}, err
	}
	defer f.Close()
	id, err := identifyOpen(f)
	if err != nil {
		return identity{}, fileID{}, err
	}
	c.mu.Lock()
	v, ok := c.known[id]
	c.mu.Unlock()
	if ok && (version == nil || v.Version != "") {
		return v, id, nil
	}
	if v, ok = c.load(id); !ok || (version != nil && v.Version == "") {
		if v.SHA256, err = hashFile(ctx, f); err != nil {
			return identity{}, fileID{}, fmt.Errorf("hash %s: %w", path, err)
		}
		if version != nil {
			if v.Version, err = version(ctx); err != nil {
				return identity{}, fileID{}, err
			}
		}
		// Not remembered if it changed in the meantime.
		if after, err := identifyOpen(f); err != nil || after != id {
			return identity{}, fileID{}, fmt.Errorf("%s changes while it is read", path)
		}
		if err := c.store(id, v); err != nil {
			glog.V(1).Infof("hash of %s not remembered: %v", path, err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil {
		c.known = make(map[fileID]identity)
	}
	c.known[id] = v
	return v, id, nil
}

func hashFile(ctx context.Context, f *os.File) (string, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); ; {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		n, err := f.ReadAt(buf, off)
		h.Write(buf[:n])
		off += int64(n)
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// maxIdentity bounds a file of the cache, in bytes.
const maxIdentity = 4096

// load looks in the directory. A file that others could have written is not
// believed.
func (c *identities) load(id fileID) (identity, bool) {
	if c.dir == "" {
		return identity{}, false
	}
	f, err := os.OpenFile(filepath.Join(c.dir, id.name()), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return identity{}, false
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm()&0o022 != 0 {
		return identity{}, false
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || (st.Uid != 0 && int(st.Uid) != os.Geteuid()) {
		return identity{}, false
	}
	b, err := io.ReadAll(io.LimitReader(f, maxIdentity))
	if err != nil {
		return identity{}, false
	}
	return parseIdentity(b)
}

func parseIdentity(b []byte) (identity, bool) {
	var v identity
	if err := json.Unmarshal(b, &v); err != nil {
		return identity{}, false
	}
	if sum, err := hex.DecodeString(v.SHA256); err != nil || len(sum) != sha256.Size {
		return identity{}, false
	}
	v.Version = printable([]byte(v.Version))
	return v, true
}

func (c *identities) store(id fileID, v identity) error {
	if c.dir == "" {
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(c.dir, ".sha256-*")
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(c.dir, id.name()))
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
