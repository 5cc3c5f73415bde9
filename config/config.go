// Package config holds the settings that an administrator gives runv once, in a
// TOML file, because containerd, Docker and Podman pass no flags of runv's own.
// Every key of the file is a field of Config and a global flag of the same name;
// a flag wins over the file, the file over Default.
//
// The package reads files and checks values. It starts nothing and knows
// nothing of the command line's library.
package config

import (
	"bytes"
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/factory/policy"
)

// DefaultPath is where the file is looked for unless a path is given.
const DefaultPath = "/etc/runv/config.toml"

// MaxFile bounds a configuration file, in bytes.
const MaxFile = 1 << 20

//go:embed config.toml.example
var example []byte

// Example returns the commented file that an installation begins with. Every
// key is in it, commented out, with its default value.
func Example() []byte { return bytes.Clone(example) }

// Duration is a time.Duration that is written as Go writes it: "90s", "1m30s".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as \"30s\"", text)
	}
	*d = Duration(v)
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String is the form that UnmarshalText reads.
func (d Duration) String() string { return time.Duration(d).String() }

// Config is the settings. The field tags are the single list from which the
// file's keys, the flags and their help texts are made.
type Config struct {
	Root      string `toml:"root" usage:"directory for the state of containers; it should be a tmpfs"`
	Log       string `toml:"log" usage:"file to append errors and warnings to, in addition to standard error"`
	LogFormat string `toml:"log-format" usage:"format of the log file, 'text' or 'json'"`
	Debug     bool   `toml:"debug" usage:"write debug messages to the log, and to a pod's supervisor.log"`

	Driver        string   `toml:"driver" usage:"hypervisor driver, such as 'kvm' or 'qemu'; empty: the best that works here"`
	QEMU          string   `toml:"qemu" usage:"path of the QEMU program; empty: looked up in PATH"`
	QEMUSandbox   bool     `toml:"qemu-sandbox" usage:"confine QEMU with its system call filter, a mount namespace and few capabilities; on unless =false"`
	Machine       string   `toml:"machine" usage:"machine type; empty: the driver's default"`
	Kernel        string   `toml:"kernel" usage:"guest kernel, as 'runv manage build-guest' makes it"`
	Initrd        string   `toml:"initrd" usage:"guest initrd, as 'runv manage build-guest' makes it"`
	KernelParams  string   `toml:"kernel-params" usage:"parameters appended to the guest kernel's command line"`
	VCPUs         int      `toml:"vcpus" usage:"virtual CPUs of a VM whose config.json sets no CPU limit"`
	Memory        int      `toml:"memory" usage:"memory of a VM in MiB; a ceiling, pages cost when the guest touches them"`
	Transport     string   `toml:"transport" usage:"how the guest agent is reached, 'serial' or 'vsock'; empty: the best that works here"`
	Network       string   `toml:"network" usage:"'namespace' for the interfaces of the container's network namespace, 'none', or 'user' for QEMU's user-mode network stack"`
	NICs          int      `toml:"nics" usage:"network cards of a VM, the most interfaces that a pod can have; part of a template"`
	Share         string   `toml:"share" usage:"how the guest reaches the host's files, '9p', 'virtiofs' (never cloned or kept ready), or 'auto' for virtiofs where a VM boots with KVM and virtiofsd is there, else 9p"`
	Virtiofsd     string   `toml:"virtiofsd" usage:"path of virtiofsd; empty: looked up in the usual places"`
	BootTimeout   Duration `toml:"boot-timeout" usage:"longest time from the start of a VM to its agent's first answer"`
	RequireCgroup bool     `toml:"require-cgroup" usage:"fail if a container's cgroup on the host cannot be made or its limits not be set there, instead of a warning"`
	Template      string   `toml:"template" usage:"directory of the template that VMs are cloned from, as 'runv manage create-template' makes it, or of those of --factory; empty or 'off': none"`

	Factory        string `toml:"factory" usage:"sizes of VMs that are kept ready or cloned, as '{\"cache\":4,\"template\":true,\"cpu\":1,\"memory\":512}' with commas between several, or 'none'"`
	FactoryDir     string `toml:"factory-dir" usage:"directory of the factory that keeps virtual machines ready ('runv manage factory'); empty or 'off': none is asked for one"`
	TemplatePolicy string `toml:"template-policy" usage:"if the template does not fit: 'required' fails, 'preferred' boots with a warning; 'off' never clones"`
}

// Default is the configuration without a file and without flags.
func Default() Config {
	return Config{
		Root:        "/run/runv",
		LogFormat:   "text",
		QEMUSandbox: true,
		Kernel:      "/var/lib/runv/kernel",
		Initrd:      "/var/lib/runv/initrd.img",
		VCPUs:       1,
		Memory:      512,
		Network:     "namespace",
		NICs:        DefaultNICs,
		Share:       "auto",
		BootTimeout: Duration(2 * time.Minute),

		Factory:        policy.None,
		FactoryDir:     "/run/runv/@factory",
		TemplatePolicy: "preferred",
	}
}

// Load returns Default changed by the file at path. An empty path means
// DefaultPath, which may be absent; a path that was given may not. The values
// are checked one by one, with Validate still to be called after the flags.
func Load(path string) (Config, error) {
	c := Default()
	explicit := path != ""
	if !explicit {
		path = DefaultPath
	}
	info, err := os.Stat(path)
	if err != nil {
		if !explicit && errors.Is(err, fs.ErrNotExist) {
			return c, nil
		}
		return c, fmt.Errorf("read configuration: %w", err)
	}
	if !info.Mode().IsRegular() {
		return c, fmt.Errorf("read configuration: %s is not a regular file", path)
	}
	if info.Size() > MaxFile {
		return c, fmt.Errorf("read configuration: %s has %d bytes, more than %d", path, info.Size(), MaxFile)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	if err := c.Decode(path, data); err != nil {
		return Default(), err
	}
	return c, nil
}

// Decode changes c by the TOML text in data. Errors begin with name, the line
// and the key.
func (c *Config) Decode(name string, data []byte) error {
	dec := toml.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	err := dec.Decode(c)
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) && len(missing.Errors) > 0 {
		e := missing.Errors[0]
		row, _ := e.Position()
		return fmt.Errorf("%s:%d: unknown key %q", name, row, strings.Join(e.Key(), "."))
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		row, _ := bad.Position()
		what := strings.TrimPrefix(bad.Error(), "toml: ")
		if key := strings.Join(bad.Key(), "."); key != "" {
			what = fmt.Sprintf("key %q: %s", key, what)
		}
		return fmt.Errorf("%s:%d: %s", name, row, what)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if key, err := c.check(); err != nil {
		return fmt.Errorf("%s:%d: %w", name, lineOf(data, key), err)
	}
	return nil
}

// lineOf finds the line that sets key, for the messages of values that are well
// formed and wrong. All keys are top-level.
func lineOf(data []byte, key string) int {
	for i, line := range strings.Split(string(data), "\n") {
		name, _, ok := strings.Cut(line, "=")
		if ok && strings.Trim(strings.TrimSpace(name), `"'`) == key {
			return i + 1
		}
	}
	return 1
}

// Validate reports the first key whose value runv cannot work with.
func (c *Config) Validate() error {
	if _, err := c.check(); err != nil {
		return err
	}
	// The file may have the one and a flag the other.
	if c.TemplatePolicy == "required" && c.TemplateDir() == "" && len(c.Entries()) == 0 {
		return errors.New("key \"template-policy\" is \"required\", and neither key \"template\" nor key \"factory\" names a template")
	}
	return nil
}

// DefaultNICs is more than most pods have networks, and MaxNICs what fits on a
// microvm beside everything else.
const (
	DefaultNICs = 4
	MaxNICs     = 16
)

// MaxVCPUs and MaxMemory bound what may be asked for, in CPUs and MiB.
const (
	MaxVCPUs  = 1024
	MaxMemory = 16 << 20
	MinMemory = 64
)

func (c *Config) check() (key string, err error) {
	for _, p := range []struct {
		key, path string
		required  bool
	}{
		{"root", c.Root, true},
		{"log", c.Log, false},
		{"kernel", c.Kernel, true},
		{"initrd", c.Initrd, true},
		{"template", c.Template, false},
		{"factory-dir", c.FactoryDir, false},
	} {
		if p.path == "" && p.required {
			return p.key, fmt.Errorf("key %q is empty", p.key)
		}
		if strings.ContainsRune(p.path, 0) {
			return p.key, fmt.Errorf("key %q has a zero byte", p.key)
		}
	}
	for _, e := range []struct {
		key, value string
		allowed    []string
	}{
		{"log-format", c.LogFormat, []string{"text", "json"}},
		{"transport", c.Transport, []string{"", "serial", "vsock"}},
		{"network", c.Network, []string{"namespace", "none", "user"}},
		{"share", c.Share, []string{"auto", "9p", "virtiofs"}},
		{"template-policy", c.TemplatePolicy, []string{"required", "preferred", "off"}},
	} {
		ok := false
		for _, a := range e.allowed {
			ok = ok || e.value == a
		}
		if !ok {
			return e.key, fmt.Errorf("key %q is %q, want %s", e.key, e.value, alternatives(e.allowed))
		}
	}
	switch {
	case c.VCPUs < 1 || c.VCPUs > MaxVCPUs:
		return "vcpus", fmt.Errorf("key \"vcpus\" is %d, want 1 to %d", c.VCPUs, MaxVCPUs)
	case c.Memory < MinMemory || c.Memory > MaxMemory:
		return "memory", fmt.Errorf("key \"memory\" is %d MiB, want %d to %d", c.Memory, MinMemory, MaxMemory)
	case c.NICs < 1 || c.NICs > MaxNICs:
		return "nics", fmt.Errorf("key \"nics\" is %d, want 1 to %d", c.NICs, MaxNICs)
	case time.Duration(c.BootTimeout) < time.Millisecond || time.Duration(c.BootTimeout) > 24*time.Hour:
		return "boot-timeout", fmt.Errorf("key \"boot-timeout\" is %s, want 1ms to 24h", c.BootTimeout)
	case strings.ContainsAny(c.KernelParams, "\x00\n"):
		return "kernel-params", errors.New("key \"kernel-params\" has a line break or a zero byte")
	}
	if _, err := policy.Parse(c.Factory); err != nil {
		return "factory", fmt.Errorf("key \"factory\": %w", err)
	}
	return "", nil
}

// TemplateDir is the directory of the template that VMs are cloned from, empty
// if they are not. With Entries it is not the whole truth, see TemplatesDir.
func (c *Config) TemplateDir() string {
	if c.boots() {
		return ""
	}
	return c.Template
}

// boots tells whether every VM is to boot, whatever else is said.
func (c *Config) boots() bool { return c.Template == "off" || c.TemplatePolicy == "off" }

// Entries are those of the factory's policy, none if every VM is to boot. The
// policy must have passed Validate.
func (c *Config) Entries() []policy.Config {
	if c.boots() {
		return nil
	}
	list, err := policy.Parse(c.Factory)
	if err != nil {
		return nil
	}
	return list
}

// TemplatesDir is what the templates of Entries are in, the key template or
// DefaultTemplates; empty if none of them has one.
func (c *Config) TemplatesDir() string {
	if !slices.ContainsFunc(c.Entries(), func(e policy.Config) bool { return e.Template }) {
		return ""
	}
	return cmp.Or(c.Template, DefaultTemplates())
}

// DefaultTemplates is the directory that templates are in unless told otherwise:
// below /run, or, on a machine where that is a disk, in memory all the same.
func DefaultTemplates() string {
	const name = "runv-templates"
	run := filepath.Join("/run", name)
	if inMemory("/run") || !inMemory("/dev/shm") {
		return run
	}
	return filepath.Join("/dev/shm", name)
}

func inMemory(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && (st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC)
}

func alternatives(list []string) string {
	var quoted []string
	for _, s := range list {
		if s != "" {
			quoted = append(quoted, strconv.Quote(s))
		}
	}
	return strings.Join(quoted, " or ")
}

// Key describes one setting.
type Key struct {
	Name  string
	Usage string
	// Bool is true for a setting that is on or off.
	Bool bool
	// Default is the value without a file, as Set takes it.
	Default string
}

// Keys lists the settings in the order of the file.
func Keys() []Key {
	c := Default()
	v := reflect.ValueOf(&c).Elem()
	t := v.Type()
	keys := make([]Key, 0, t.NumField())
	for i := range t.NumField() {
		f := t.Field(i)
		keys = append(keys, Key{
			Name:    f.Tag.Get("toml"),
			Usage:   f.Tag.Get("usage"),
			Bool:    f.Type.Kind() == reflect.Bool,
			Default: format(v.Field(i)),
		})
	}
	return keys
}

// Get returns the value of the named key as Set takes it.
func (c *Config) Get(name string) (string, error) {
	f, err := c.field(name)
	if err != nil {
		return "", err
	}
	return format(f), nil
}

// Set gives the named key a value from a command line.
func (c *Config) Set(name, value string) error {
	f, err := c.field(name)
	if err != nil {
		return err
	}
	switch p := f.Addr().Interface().(type) {
	case *string:
		*p = value
	case *bool:
		b, err := strconv.ParseBool(value)
		if err != nil {
			return fmt.Errorf("--%s: %q is neither true nor false", name, value)
		}
		*p = b
	case *int:
		n, err := strconv.Atoi(value)
		if err != nil {
			return fmt.Errorf("--%s: %q is not a number", name, value)
		}
		*p = n
	case *Duration:
		if err := p.UnmarshalText([]byte(value)); err != nil {
			return fmt.Errorf("--%s: %w", name, err)
		}
	default:
		return fmt.Errorf("--%s: cannot be set from a command line", name)
	}
	return nil
}

func (c *Config) field(name string) (reflect.Value, error) {
	v := reflect.ValueOf(c).Elem()
	t := v.Type()
	for i := range t.NumField() {
		if t.Field(i).Tag.Get("toml") == name {
			return v.Field(i), nil
		}
	}
	return reflect.Value{}, fmt.Errorf("no setting is named %q", name)
}

func format(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case string:
		return x
	case bool:
		return strconv.FormatBool(x)
	case int:
		return strconv.Itoa(x)
	case Duration:
		return x.String()
	}
	return ""
}
