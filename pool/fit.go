package pool

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/factory/policy"
)

// sizes and choices of a VM are compared by what they mean, not by their text.
var byMeaning = []protoreflect.Name{"vcpus", "memory_mib", "template", "template_policy", "factory", "boot_timeout_ms", "share", "virtiofsd"}

// fits says why a VM that was made as have does not serve a request for want: nil
// if it does. Any more processors and memory are good, as with templates: the
// limits of containers are enforced in the guest.
func fits(have, want *supervisorv1.VM) error {
	if have.Vcpus < want.Vcpus {
		return fmt.Errorf("vcpus: it has %d, %d are asked for", have.Vcpus, want.Vcpus)
	}
	if have.MemoryMib < want.MemoryMib {
		return fmt.Errorf("memory: it has %d MiB, %d are asked for", have.MemoryMib, want.MemoryMib)
	}
	// One that is ready has 9p, whatever its own configuration says.
	if want.Share == "virtiofs" {
		return fmt.Errorf("share: it has 9p, virtiofs is asked for, and a VM with that is not kept ready")
	}
	h, err := source(have)
	if err != nil {
		return err
	}
	w, err := source(want)
	if err != nil {
		return err
	}
	if h != w {
		return fmt.Errorf("template: it has %s, %s is asked for", orNone(h), orNone(w))
	}
	a, b := have.ProtoReflect(), want.ProtoReflect()
	if proto.Equal(plain(have), plain(want)) {
		return nil
	}
	fields := a.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if !slices.Contains(byMeaning, f.Name()) && !a.Get(f).Equal(b.Get(f)) {
			return fmt.Errorf("%s: it has %q, %q is asked for", strings.ReplaceAll(string(f.Name()), "_", "-"), a.Get(f).String(), b.Get(f).String())
		}
	}
	return fmt.Errorf("it is of another version")
}

// plain is a VM without what is compared by its meaning.
func plain(vm *supervisorv1.VM) *supervisorv1.VM {
	c := proto.Clone(vm).(*supervisorv1.VM)
	r := c.ProtoReflect()
	for _, name := range byMeaning {
		r.Clear(r.Descriptor().Fields().ByName(name))
	}
	return c
}

// source is the directory of templates that a VM comes from, empty if it boots.
func source(vm *supervisorv1.VM) (string, error) {
	if vm.Template == "" || vm.TemplatePolicy == "off" {
		return "", nil
	}
	if vm.Factory != "" {
		list, err := policy.Parse(vm.Factory)
		if err != nil {
			return "", err
		}
		i := policy.Choose(list, int(vm.Vcpus), int(vm.MemoryMib))
		if len(list) > 0 && (i < 0 || !list[i].Template) {
			return "", nil
		}
	}
	return filepath.Clean(vm.Template), nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// stamp is what the kernel says of files: another one if a file was replaced or
// written to. A file that is not there has a stamp, too.
func stamp(paths []string) string {
	var b strings.Builder
	for _, p := range paths {
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil {
			fmt.Fprintf(&b, "%s %v\n", p, err)
			continue
		}
		fmt.Fprintf(&b, "%s %d:%d %d %d.%d %d.%d\n", p, st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec)
	}
	return b.String()
}

// program is the path of what a process executes; empty if it cannot be told.
func program(pid int) string {
	p, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return ""
	}
	return p
}
