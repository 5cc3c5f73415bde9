package guestimage

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
)

// apt is the packageSource of Debian and what descends from it.
type apt struct{}

// maxPackageFile bounds one file of a package.
const maxPackageFile = 1 << 30

var kernelPackageName = regexp.MustCompile(`^linux-image-[0-9][a-z0-9.+-]*$`)

// Resolve follows the package that always depends on the current kernel.
func (a apt) Resolve(ctx context.Context) (kernelPackage, error) {
	meta := "linux-image-" + runtime.GOARCH
	rec, err := a.show(ctx, meta)
	if err != nil {
		return kernelPackage{}, err
	}
	for dep := range strings.SplitSeq(rec["Depends"], ",") {
		name, rest, _ := strings.Cut(strings.TrimSpace(dep), " ")
		if !kernelPackageName.MatchString(name) {
			continue
		}
		if v := strings.TrimSuffix(strings.TrimPrefix(rest, "(= "), ")"); v != rest && v != "" {
			name += "=" + v
		}
		rec, err := a.show(ctx, name)
		if err != nil {
			return kernelPackage{}, err
		}
		p := kernelPackage{Name: rec["Package"], Version: rec["Version"], Arch: rec["Architecture"], SHA256: rec["SHA256"]}
		if p.Name == "" || p.Version == "" || p.Arch == "" || len(p.SHA256) != 64 {
			return kernelPackage{}, fmt.Errorf("apt-cache show %s: a field is missing", name)
		}
		return p, nil
	}
	return kernelPackage{}, fmt.Errorf("package %s depends on no kernel: %q", meta, rec["Depends"])
}

// show returns the fields of a package's candidate version.
func (apt) show(ctx context.Context, name string) (map[string]string, error) {
	out, err := run(exec.CommandContext(ctx, "apt-cache", "show", "--no-all-versions", name))
	if err != nil {
		return nil, fmt.Errorf("%w (is there a package list? apt-get update fetches it)", err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(out)) {
		line = strings.TrimRight(line, "\n")
		if line == "" && len(fields) > 0 {
			break
		}
		if k, v, ok := strings.Cut(line, ": "); ok && !strings.HasPrefix(line, " ") {
			fields[k] = v
		}
	}
	return fields, nil
}

// Download uses apt-get, which verifies what it gets.
func (apt) Download(ctx context.Context, p kernelPackage, dir string) (string, error) {
	// As root apt would change to a user who may not write into dir.
	cmd := exec.CommandContext(ctx, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", p.Name+"="+p.Version)
	cmd.Dir = dir
	if _, err := run(cmd); err != nil {
		return "", err
	}
	found, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fmt.Errorf("apt-get download left %d packages, want 1", len(found))
	}
	return found[0], nil
}

// Unpack lets dpkg-deb, which is wherever apt is, take the archive apart: it is
// several times faster than xz in Go. The files are written here, so a package
// can write nowhere but below dir.
func (apt) Unpack(ctx context.Context, file, dir string) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", file)
	var stderr tail
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	unpackErr := unpackTar(out, dir)
	if unpackErr != nil {
		cancel()
	}
	waitErr := cmd.Wait()
	// A truncated archive fails on both sides; what dpkg-deb says is clearer.
	if waitErr != nil && ctx.Err() == nil {
		return fmt.Errorf("dpkg-deb: %w: %s", waitErr, stderr.line())
	}
	if unpackErr != nil && stderr.line() != "" {
		return fmt.Errorf("%w (dpkg-deb: %s)", unpackErr, stderr.line())
	}
	return unpackErr
}

// unpackTar writes the regular files below boot/ and lib/modules/ to dir.
func unpackTar(r io.Reader, dir string) error {
	root, err := makeRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			// dpkg-deb pads the end; read it, else it dies of a closed pipe.
			_, err := io.Copy(io.Discard, r)
			return err
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		name := strings.TrimPrefix(filepath.Clean("/"+h.Name), "/")
		// Newer packages have everything below usr.
		name = strings.TrimPrefix(name, "usr/")
		if h.Typeflag != tar.TypeReg || !strings.HasPrefix(name, "boot/vmlinuz-") && !strings.HasPrefix(name, "lib/modules/") {
			continue
		}
		if h.Size > maxPackageFile {
			return fmt.Errorf("read archive: %s has %d bytes", h.Name, h.Size)
		}
		if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, tr)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
}

func makeRoot(dir string) (*os.Root, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return os.OpenRoot(dir)
}

// run returns what cmd prints; its error names the command and has the last
// line of what it said on stderr.
func run(cmd *exec.Cmd) ([]byte, error) {
	var stderr tail
	cmd.Stderr = &stderr
	// Messages are read by people who may report them: in English.
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, stderr.line())
	}
	return out, nil
}

// tail keeps the end of what is written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-4096):]
	return len(p), nil
}

// line is the last line that is not empty.
func (t *tail) line() string {
	s := strings.TrimSpace(string(t.b))
	return strings.TrimSpace(s[strings.LastIndexByte(s, '\n')+1:])
}
