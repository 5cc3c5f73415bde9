package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Files of the initrd that say which kernel modules there are;
// docs/guest-image.md has the formats. All are optional: a kernel may have
// everything built in.
const (
	// ModuleList has the modules that are always loaded, in order.
	ModuleList = "etc/runv/modules"
	// LaterList has those that are loaded when they are needed, each with the
	// files that it depends on.
	LaterList = "etc/runv/modules.later"
	// AliasList has the names by which devices and the kernel ask for them.
	AliasList = "etc/runv/modules.alias"
	// SignatureSuffix ends the name of a module's signature.
	SignatureSuffix = ".sig"
	// ModuleLoader is the program that the kernel starts, as `/init -q -- NAME`,
	// when it wants a module.
	ModuleLoader = "/init"
)

// errNoModule is wrapped if the initrd has no module of a name.
var errNoModule = errors.New("the guest image has no such module")

// modules is what the initrd offers.
type modules struct {
	root    string
	log     *log.Logger
	boot    []string            // files
	later   map[string][]string // name → files, the module itself last
	aliases []moduleAlias

	mu    sync.Mutex
	asked map[string]error // what came of load: nothing unloads a module; guarded by mu
}

type moduleAlias struct{ pattern, name string }

// readModules reads the lists below root.
func readModules(root string, log *log.Logger) *modules {
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			log.Print(err)
		}
		return b
	}
	m := parseModules(read(ModuleList), read(LaterList), read(AliasList))
	m.root, m.log = root, log
	return m
}

func parseModules(boot, later, alias []byte) *modules {
	m := &modules{later: make(map[string][]string)}
	for l := range moduleLines(boot) {
		m.boot = append(m.boot, l)
	}
	for l := range moduleLines(later) {
		if name, files, ok := strings.Cut(l, ":"); ok {
			m.later[name] = strings.Fields(files)
		}
	}
	for l := range moduleLines(alias) {
		if pattern, name, ok := strings.Cut(l, " "); ok {
			m.aliases = append(m.aliases, moduleAlias{pattern, strings.TrimSpace(name)})
		}
	}
	return m
}

// moduleLines yields the lines of a list that are neither empty nor comments.
func moduleLines(b []byte) func(func(string) bool) {
	return func(yield func(string) bool) {
		for l := range bytes.Lines(b) {
			l = bytes.TrimSpace(l)
			if len(l) > 0 && l[0] != '#' && !yield(string(l)) {
				return
			}
		}
	}
}

// loadBoot loads the modules that are always needed. What fails is logged:
// whoever needs the module will fail with an error of its own.
func (m *modules) loadBoot(ctx context.Context) {
	for _, file := range m.boot {
		if ctx.Err() != nil {
			return
		}
		if err := m.loadFile(file); err != nil {
			m.log.Print(err)
		}
	}
}

// onDemand are the virtio devices, as the beginnings of their modaliases, whose
// drivers are not loaded because they are there: every VM has them, and a pod
// without a network is not to see a card. Network cards and SCSI controllers
// (virtio 1.2, section 5, device types 1 and 8).
var onDemand = []string{"virtio:d00000001v", "virtio:d00000008v"}

// loadDevices loads the drivers of the devices in a directory of sysfs.
func (m *modules) loadDevices(dir string) {
	devices, err := os.ReadDir(dir)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			m.log.Print(err)
		}
		return
	}
	for _, d := range devices {
		b, err := os.ReadFile(filepath.Join(dir, d.Name(), "modalias"))
		if err != nil {
			continue // it is gone again
		}
		alias := string(bytes.TrimSpace(b))
		if slices.ContainsFunc(onDemand, func(p string) bool { return strings.HasPrefix(alias, p) }) {
			continue
		}
		if err := m.load(alias); err != nil && !errors.Is(err, errNoModule) {
			m.log.Print(err)
		}
	}
}

// names are the modules that answer to a name or an alias.
func (m *modules) names(alias string) []string {
	// The kernel's names have underscores where those of files may have dashes.
	if name := strings.ReplaceAll(alias, "-", "_"); m.later[name] != nil {
		return []string{name}
	}
	var names []string
	for _, a := range m.aliases {
		if ok, err := path.Match(a.pattern, alias); ok && err == nil && m.later[a.name] != nil {
			names = append(names, a.name)
		}
	}
	return names
}

// load loads the module with a name or an alias, and what it depends on. What
// has come of it is remembered, unless it failed.
func (m *modules) load(alias string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err, ok := m.asked[alias]; ok {
		return err
	}
	err := m.loadNew(alias)
	if err == nil || errors.Is(err, errNoModule) {
		if m.asked == nil {
			m.asked = make(map[string]error)
		}
		m.asked[alias] = err
	}
	return err
}

func (m *modules) loadNew(alias string) error {
	names := m.names(alias)
	if len(names) == 0 {
		return fmt.Errorf("load module %q: %w", alias, errNoModule)
	}
	var errs []error
	for _, name := range names {
		for _, file := range m.later[name] {
			if err := m.loadFile(file); err != nil {
				errs = append(errs, err)
				break
			}
		}
	}
	return errors.Join(errs...)
}

// modInitCompressedFile is MODULE_INIT_COMPRESSED_FILE of finit_module(2).
const modInitCompressedFile = 4

// loadFile loads one file; that it is loaded already is no error.
func (m *modules) loadFile(file string) error {
	name := filepath.Join(m.root, file)
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }()
	flags := 0
	if filepath.Ext(file) != ".ko" {
		flags = modInitCompressedFile
	}
	err = unix.FinitModule(fd, "", flags)
	if errors.Is(err, unix.EKEYREJECTED) || errors.Is(err, unix.EPERM) {
		// The kernel insists on signatures. The image has them beside the modules.
		err = loadSigned(name, err)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	return nil
}

// loadSigned loads a module with its signature at its end. refused is the error
// without, and is returned if there is none.
func loadSigned(name string, refused error) error {
	sig, err := os.ReadFile(name + SignatureSuffix)
	if err != nil {
		return refused
	}
	module, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	return unix.InitModule(append(module, sig...), "")
}
