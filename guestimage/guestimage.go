// Package guestimage assembles what a VM of runv boots: a kernel, and an initrd
// that holds the guest agent as /init and the kernel modules that it may need.
// The parts are stock: the host's own kernel, or the distribution's kernel
// package unpacked without being installed, or a kernel that the caller names.
//
// What enters: a kernel file, a tree of modules, the agent's binary. What
// leaves: the files kernel, initrd.img and manifest.json in one directory.
// The same input gives the same bytes, so a second Build changes nothing.
// docs/guest-image.md describes the layout of the initrd.
package guestimage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Schema is the version of manifest.json that this package reads and writes.
const Schema = 1

// Names of the files in the output directory.
const (
	KernelFile   = "kernel"
	InitrdFile   = "initrd.img"
	ManifestFile = "manifest.json"
)

// Defaults of Options.
const (
	DefaultOutput   = "/var/lib/runv"
	DefaultCacheDir = "/var/cache/runv"
)

// NoModules as Options.Modules builds an initrd without modules, for a kernel
// that has everything built in.
const NoModules = "none"

// ErrNoImage is wrapped by Load if the directory holds no guest image.
var ErrNoImage = errors.New("no guest image")

// Options say what to build from. Every field is optional.
type Options struct {
	// Kernel is a bzImage, an ELF vmlinux with a PVH entry or, on arm64, an
	// Image. Empty: the running kernel of the host if its files are there and
	// have what a guest needs, else the distribution's kernel package.
	Kernel string
	// Modules is the directory of the kernel's modules, such as
	// /lib/modules/6.1.0-56-amd64, or NoModules. Empty: the directory in
	// /lib/modules that bears the version of Kernel.
	Modules string
	// Output is the directory that receives the image; DefaultOutput if empty.
	Output string
	// Agent is the static runv-agent binary. Empty: beside the running
	// program, or in ../libexec/runv from there.
	Agent string
	// CacheDir keeps downloaded and unpacked kernel packages;
	// DefaultCacheDir if empty.
	CacheDir string
	// Compression of the initrd: "none" (also if empty), "gzip" or "zstd".
	// None boots fastest wherever the file is in the page cache.
	Compression string
	// KeepKernel copies a bzImage as it is. Without it the ELF kernel inside is
	// taken out where it has a PVH entry, which spares every boot the
	// decompression.
	KeepKernel bool
	// Log receives one line per step that takes time; nil: nobody.
	Log func(line string)

	// root replaces "/" where the host's kernel is looked for; tests only.
	root string
	// packages replaces the distribution's package tools; tests only.
	packages packageSource
}

// Manifest describes a guest image. It is written last, so an image without one
// is half made.
type Manifest struct {
	Schema int `json:"schema"`
	// Arch is the GOARCH of the guest.
	Arch string `json:"arch"`
	// KernelVersion is what uname -r says in the guest.
	KernelVersion string `json:"kernelVersion"`
	// KernelFormat is "elf", "bzimage" or "image".
	KernelFormat string `json:"kernelFormat"`
	// KernelSource says where the kernel came from: a path, or the package and
	// its version.
	KernelSource string `json:"kernelSource"`
	// KernelInput identifies what the kernel file was made from, and how.
	KernelInput string `json:"kernelInput"`
	// BootModules are loaded by the agent when it starts, in this order;
	// LaterModules are there for when they are needed.
	BootModules  []string `json:"bootModules"`
	LaterModules []string `json:"laterModules"`
	// AgentVersion is what `runv-agent --version` printed.
	AgentVersion string `json:"agentVersion"`
	AgentSHA256  string `json:"agentSHA256"`
	// KernelSHA256 and InitrdSHA256 are of the files beside the manifest.
	KernelSHA256 string `json:"kernelSHA256"`
	InitrdSHA256 string `json:"initrdSHA256"`
	// Compression of the initrd.
	Compression string `json:"compression"`

	// Unchanged is true if Build found exactly this image in place already.
	Unchanged bool `json:"-"`
}

// Build assembles the guest image that o describes. It replaces an image that is
// there file by file with renames: VMs that use the old one go on, and a failure
// leaves the old one as it was. Two Builds for one directory take turns.
func Build(ctx context.Context, o Options) (Manifest, error) {
	if err := o.defaults(); err != nil {
		return Manifest{}, err
	}
	agent, err := os.ReadFile(o.Agent)
	if err != nil {
		return Manifest{}, fmt.Errorf("read agent: %w", err)
	}
	agentVersion, err := checkAgent(ctx, o.Agent, agent)
	if err != nil {
		return Manifest{}, err
	}
	src, err := findKernel(ctx, &o)
	if err != nil {
		return Manifest{}, err
	}
	k, err := o.kernelImage(src.kernel)
	if err != nil {
		return Manifest{}, err
	}
	m := Manifest{
		Schema:        Schema,
		Arch:          runtime.GOARCH,
		KernelVersion: k.version,
		KernelFormat:  k.format,
		KernelSource:  src.from,
		KernelInput:   k.input,
		BootModules:   []string{},
		LaterModules:  []string{},
		AgentVersion:  agentVersion,
		AgentSHA256:   sum(agent),
		Compression:   o.Compression,
	}
	var mods moduleSet
	if src.modules != NoModules {
		if mods, err = collect(src.modules, k.version); err != nil {
			return Manifest{}, err
		}
		m.BootModules, m.LaterModules = mods.names()
	}
	initrd, err := makeInitrd(agent, mods, o.Compression)
	if err != nil {
		return Manifest{}, err
	}
	m.KernelSHA256, m.InitrdSHA256 = sum(k.data), sum(initrd)
	if err := ctx.Err(); err != nil {
		return Manifest{}, fmt.Errorf("build guest image: %w", err)
	}
	return install(&o, m, k.data, initrd)
}

// kernelImage reads the kernel at path. To take it out of a bzImage costs
// seconds, so the kernel in the output directory is used again if it was made
// from the same file in the same way.
func (o *Options) kernelImage(path string) (kernelImage, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return kernelImage{}, fmt.Errorf("read kernel: %w", err)
	}
	input := fmt.Sprintf("sha256:%s recipe:%d keep:%v", sum(data), kernelRecipe, o.KeepKernel)
	if old, err := Load(o.Output); err == nil && old.KernelInput == input {
		b, err := os.ReadFile(filepath.Join(o.Output, KernelFile))
		if err == nil && sum(b) == old.KernelSHA256 {
			return kernelImage{data: b, version: old.KernelVersion, format: old.KernelFormat, input: input}, nil
		}
	}
	k, err := parseKernel(data, o.KeepKernel)
	if err != nil {
		return kernelImage{}, fmt.Errorf("read kernel %s: %w", path, err)
	}
	k.input = input
	return k, nil
}

// Load reads the manifest in dir. It does not read kernel and initrd; Verify
// does.
func Load(dir string) (Manifest, error) {
	b, err := os.ReadFile(filepath.Join(dir, ManifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Manifest{}, fmt.Errorf("%w in %s", ErrNoImage, dir)
	}
	if err != nil {
		return Manifest{}, fmt.Errorf("read guest image manifest: %w", err)
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return Manifest{}, fmt.Errorf("read guest image manifest %s: %w", filepath.Join(dir, ManifestFile), err)
	}
	if m.Schema != Schema {
		return Manifest{}, fmt.Errorf("guest image manifest %s: schema is %d, want %d", filepath.Join(dir, ManifestFile), m.Schema, Schema)
	}
	return m, nil
}

// Verify compares the files in dir with the manifest there.
func Verify(dir string) (Manifest, error) {
	m, err := Load(dir)
	if err != nil {
		return Manifest{}, err
	}
	for _, f := range []struct{ name, want string }{{KernelFile, m.KernelSHA256}, {InitrdFile, m.InitrdSHA256}} {
		b, err := os.ReadFile(filepath.Join(dir, f.name))
		if err != nil {
			return Manifest{}, fmt.Errorf("verify guest image: %w", err)
		}
		if got := sum(b); got != f.want {
			return Manifest{}, fmt.Errorf("verify guest image: %s does not match %s: sha256 is %s, want %s",
				filepath.Join(dir, f.name), ManifestFile, got, f.want)
		}
	}
	return m, nil
}

// defaults fills in what o leaves open and rejects what no build can use.
func (o *Options) defaults() error {
	if o.Output == "" {
		o.Output = DefaultOutput
	}
	if o.CacheDir == "" {
		o.CacheDir = DefaultCacheDir
	}
	if o.Compression == "" {
		o.Compression = "none"
	}
	if o.root == "" {
		o.root = "/"
	}
	if o.packages == nil {
		o.packages = apt{}
	}
	if o.Log == nil {
		o.Log = func(string) {}
	}
	switch o.Compression {
	case "none", "gzip", "zstd":
	default:
		return fmt.Errorf("compression is %q, want none, gzip or zstd", o.Compression)
	}
	if o.Kernel == "" && o.Modules != "" {
		return errors.New("modules are given without a kernel: give both")
	}
	if o.Agent == "" {
		p, err := findAgent()
		if err != nil {
			return err
		}
		o.Agent = p
	}
	return nil
}

// findAgent looks for the agent's binary where make build and make install put
// it, as seen from the running program.
func findAgent() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find agent: %w", err)
	}
	dir := filepath.Dir(self)
	tried := []string{filepath.Join(dir, "runv-agent"), filepath.Join(dir, "..", "libexec", "runv", "runv-agent")}
	for _, p := range tried {
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", fmt.Errorf("find agent: no runv-agent at %s", strings.Join(tried, " or "))
}

// checkAgent makes sure that the agent can be /init of an initrd that has no
// dynamic linker, and asks for its version.
func checkAgent(ctx context.Context, path string, data []byte) (string, error) {
	if err := staticELF(data); err != nil {
		return "", fmt.Errorf("agent %s: %w", path, err)
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask agent %s for its version: %w", path, err)
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	line = strings.TrimPrefix(strings.TrimPrefix(line, "runv-agent "), "version ")
	if line == "" || len(line) > 200 {
		return "", fmt.Errorf("ask agent %s for its version: it printed %d bytes, want one line", path, len(out))
	}
	return line, nil
}

// install puts the image into o.Output unless it is there already.
func install(o *Options, m Manifest, kernel, initrd []byte) (Manifest, error) {
	// 0755: the image holds no secret, and checks run as any user.
	if err := os.MkdirAll(o.Output, 0o755); err != nil {
		return Manifest{}, fmt.Errorf("make output directory: %w", err)
	}
	unlock, err := lockDir(o.Output)
	if err != nil {
		return Manifest{}, err
	}
	defer unlock()
	manifest, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return Manifest{}, fmt.Errorf("encode manifest: %w", err)
	}
	manifest = append(manifest, '\n')
	if old, err := os.ReadFile(filepath.Join(o.Output, ManifestFile)); err == nil && bytes.Equal(old, manifest) {
		if _, err := Verify(o.Output); err == nil {
			m.Unchanged = true
			return m, nil
		}
	}
	tmp, err := os.MkdirTemp(o.Output, ".build-")
	if err != nil {
		return Manifest{}, fmt.Errorf("make temporary directory: %w", err)
	}
	defer os.RemoveAll(tmp)
	files := []struct {
		name string
		data []byte
	}{{KernelFile, kernel}, {InitrdFile, initrd}, {ManifestFile, manifest}}
	for _, f := range files {
		if err := writeSynced(filepath.Join(tmp, f.name), f.data); err != nil {
			return Manifest{}, fmt.Errorf("write guest image in %s: %w", o.Output, err)
		}
	}
	// The three renames are one step for everybody but a crash between them,
	// after which Verify fails and the next Build repairs.
	for _, f := range files {
		if err := os.Rename(filepath.Join(tmp, f.name), filepath.Join(o.Output, f.name)); err != nil {
			return Manifest{}, fmt.Errorf("put guest image in place: %w", err)
		}
	}
	if err := syncDir(o.Output); err != nil {
		return Manifest{}, err
	}
	return m, nil
}

// lockDir takes an exclusive flock on dir itself; no lock file is left behind.
func lockDir(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	for {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		_ = d.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { _ = d.Close() }, nil
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}
