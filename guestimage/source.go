package guestimage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// kernelSource is where a build takes kernel and modules from.
type kernelSource struct {
	kernel  string // file
	modules string // directory, or NoModules
	from    string // for the manifest
}

// findKernel decides what to build from, in the order that Options.Kernel
// documents.
func findKernel(ctx context.Context, o *Options) (kernelSource, error) {
	if o.Kernel != "" {
		s := kernelSource{kernel: o.Kernel, modules: o.Modules, from: o.Kernel}
		if s.modules == "" {
			data, err := os.ReadFile(o.Kernel)
			if err != nil {
				return kernelSource{}, fmt.Errorf("read kernel: %w", err)
			}
			k, err := parseKernel(data, true)
			if err != nil {
				return kernelSource{}, fmt.Errorf("read kernel %s: %w", o.Kernel, err)
			}
			s.modules = modulesDirOf(o.root, k.version)
			if _, err := os.Stat(s.modules); err != nil {
				return kernelSource{}, fmt.Errorf("find modules of kernel %s: %w (name their directory, or %q)", k.version, err, NoModules)
			}
		}
		return s, nil
	}
	s, err := hostKernel(o)
	if err == nil {
		return s, nil
	}
	o.Log(fmt.Sprintf("the kernel of this host is not used: %v", err))
	return packagedKernel(ctx, o)
}

// hostKernel is the running kernel, if its files are installed and it has what
// a guest needs. The cloud flavours of distributions have no 9p.
func hostKernel(o *Options) (kernelSource, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return kernelSource{}, fmt.Errorf("uname: %w", err)
	}
	version := unix.ByteSliceToString(u.Release[:])
	s := kernelSource{
		kernel:  filepath.Join(o.root, "boot", "vmlinuz-"+version),
		modules: modulesDirOf(o.root, version),
	}
	s.from = s.kernel
	for _, p := range []string{s.kernel, s.modules} {
		if _, err := os.Stat(p); err != nil {
			return kernelSource{}, err
		}
	}
	t, err := openTree(s.modules, version)
	if err != nil {
		return kernelSource{}, err
	}
	if m := t.missing(); len(m) > 0 {
		return kernelSource{}, fmt.Errorf("%s has no %s", s.modules, strings.Join(m, ", "))
	}
	return s, nil
}

// packageSource is the distribution's package tools, as far as a kernel needs
// them.
type packageSource interface {
	// Resolve names the package that holds the current generic kernel.
	Resolve(ctx context.Context) (kernelPackage, error)
	// Download puts it into dir and returns the file.
	Download(ctx context.Context, p kernelPackage, dir string) (string, error)
	// Unpack writes kernel and modules of the package file below dir: boot/…
	// and lib/modules/….
	Unpack(ctx context.Context, file, dir string) error
}

// kernelPackage is one version of a package.
type kernelPackage struct {
	Name, Version, Arch string
	SHA256              string // of the package file
}

func (p kernelPackage) id() string {
	return p.Name + "_" + strings.ReplaceAll(p.Version, ":", "%3a") + "_" + p.Arch
}

// rootsFile lists, in an unpacked package, the modules for which it was pruned.
const rootsFile = "roots"

// packagedKernel downloads and unpacks the distribution's kernel, each unless
// the cache has it.
func packagedKernel(ctx context.Context, o *Options) (kernelSource, error) {
	p, err := o.packages.Resolve(ctx)
	if err != nil {
		return kernelSource{}, fmt.Errorf("find the distribution's kernel package: %w", err)
	}
	if err := os.MkdirAll(o.CacheDir, 0o755); err != nil {
		return kernelSource{}, fmt.Errorf("make cache directory: %w", err)
	}
	unlock, err := lockDir(o.CacheDir)
	if err != nil {
		return kernelSource{}, err
	}
	defer unlock()
	dir := filepath.Join(o.CacheDir, p.id())
	roots := strings.Join(append(append([]string{}, bootModules...), laterModules...), "\n") + "\n"
	if have, err := os.ReadFile(filepath.Join(dir, rootsFile)); err != nil || string(have) != roots {
		deb := dir + ".deb"
		if err := fetchPackage(ctx, o, p, deb); err != nil {
			return kernelSource{}, err
		}
		if err := unpackPackage(ctx, o, deb, dir, roots); err != nil {
			return kernelSource{}, err
		}
	}
	kernel, version, err := unpackedKernel(dir)
	if err != nil {
		return kernelSource{}, err
	}
	return kernelSource{kernel: kernel, modules: modulesDirOf(dir, version), from: p.Name + " " + p.Version}, nil
}

// fetchPackage makes sure that deb is the package file.
func fetchPackage(ctx context.Context, o *Options, p kernelPackage, deb string) error {
	err := checkSum(deb, p.SHA256)
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		o.Log(fmt.Sprintf("%v: downloading it again", err))
	}
	o.Log(fmt.Sprintf("downloading %s %s", p.Name, p.Version))
	tmp, err := os.MkdirTemp(o.CacheDir, ".download-")
	if err != nil {
		return fmt.Errorf("make temporary directory: %w", err)
	}
	defer os.RemoveAll(tmp)
	file, err := o.packages.Download(ctx, p, tmp)
	if err != nil {
		return fmt.Errorf("download %s: %w", p.Name, err)
	}
	if err := checkSum(file, p.SHA256); err != nil {
		return fmt.Errorf("download %s: %w", p.Name, err)
	}
	if err := os.Rename(file, deb); err != nil {
		return fmt.Errorf("keep package: %w", err)
	}
	return nil
}

func checkSum(file, want string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if got := sum(b); got != want {
		return fmt.Errorf("%s: sha256 is %s, want %s", file, got, want)
	}
	return nil
}

// unpackPackage makes dir from the package file: the kernel and those modules
// that an initrd can need.
func unpackPackage(ctx context.Context, o *Options, deb, dir, roots string) error {
	o.Log("unpacking " + filepath.Base(deb))
	tmp, err := os.MkdirTemp(o.CacheDir, ".unpack-")
	if err != nil {
		return fmt.Errorf("make temporary directory: %w", err)
	}
	defer os.RemoveAll(tmp)
	all, pruned := filepath.Join(tmp, "all"), filepath.Join(tmp, "pruned")
	if err := o.packages.Unpack(ctx, deb, all); err != nil {
		return fmt.Errorf("unpack %s: %w", deb, err)
	}
	kernel, version, err := unpackedKernel(all)
	if err != nil {
		return fmt.Errorf("unpack %s: %w", deb, err)
	}
	mods, err := collect(modulesDirOf(all, version), version)
	if err != nil {
		return fmt.Errorf("unpack %s: %w", deb, err)
	}
	move := []string{filepath.Join("boot", filepath.Base(kernel)), filepath.Join("lib/modules", version, "modules.builtin")}
	for _, m := range mods.files {
		move = append(move, m.path)
	}
	for _, p := range move {
		if err := os.MkdirAll(filepath.Join(pruned, filepath.Dir(p)), 0o755); err != nil {
			return fmt.Errorf("unpack %s: %w", deb, err)
		}
		src := filepath.Join(all, p)
		if _, err := os.Lstat(src); errors.Is(err, fs.ErrNotExist) {
			// The tree has it compressed; collect has read it by that name.
			if src, err = compressedName(src); err != nil {
				return fmt.Errorf("unpack %s: %w", deb, err)
			}
			p += filepath.Ext(src)
		}
		if err := os.Rename(src, filepath.Join(pruned, p)); err != nil {
			return fmt.Errorf("unpack %s: %w", deb, err)
		}
	}
	if err := writeSynced(filepath.Join(pruned, rootsFile), []byte(roots)); err != nil {
		return fmt.Errorf("unpack %s: %w", deb, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove old kernel files: %w", err)
	}
	if err := os.Rename(pruned, dir); err != nil {
		return fmt.Errorf("keep kernel files: %w", err)
	}
	return nil
}

func compressedName(path string) (string, error) {
	for _, ext := range []string{".xz", ".zst", ".gz"} {
		if _, err := os.Lstat(path + ext); err == nil {
			return path + ext, nil
		}
	}
	return "", fmt.Errorf("%s: %w", path, fs.ErrNotExist)
}

// unpackedKernel finds the one kernel below dir and its version.
func unpackedKernel(dir string) (kernel, version string, err error) {
	found, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil {
		return "", "", err
	}
	if len(found) != 1 {
		return "", "", fmt.Errorf("%d kernels in %s, want one boot/vmlinuz-*", len(found), dir)
	}
	return found[0], strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-"), nil
}
