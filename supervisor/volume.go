package supervisor

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// Containers of a pod that are given the same files of the host have one mount of
// them in the share. To the guest's kernel a file is what it is by its path there
// (9p) or by the mount that it is on (virtiofs): only below the same mount do two
// containers find the same socket, fifo, lock or page.
//
// A volume's place is @K/NAME, with a K that no other volume of the pod ever has:
// a mount outlives the container that it was made for, whose id may come again,
// and what a guest remembers of a name stays true. No container's id begins with
// an at sign.

// rootField is HostMount.Field of a container's root file system.
const rootField = "root.path"

// isVolume says whether m can be the mount of several containers.
func isVolume(m *supervisorv1.HostMount) bool {
	return !m.ExecutableCopy && m.Field != rootField
}

// volume is a mount in the share; guarded by share.mu.
type volume struct {
	path  string
	users int // places in containers
	// kept says that the guest keeps what it has looked up and read (the tag
	// CachedShareTag). What it knows there it knows by the file, however it came to
	// it: of one that it sees again in another place it goes on to ask for by the
	// first. So all such volumes of a file system stay until the last has no user,
	// and of what comes after that nothing is kept.
	kept bool
	// What the kernel says of it; zero until it is mounted.
	root  fileID
	mount uint64 // STATX_MNT_ID
}

// fileID is what a file of the host is known by as long as something holds it.
type fileID struct {
	dev device
	ino uint64
}

type device struct{ major, minor uint32 }

func idOf(st *unix.Statx_t) fileID { return fileID{device{st.Dev_major, st.Dev_minor}, st.Ino} }

func (v *volume) identify(st *unix.Statx_t) { v.root, v.mount = idOf(st), st.Mnt_id }

// keepRoot lets the guest keep what it looks up and reads of a root file system, if
// that is wished for, once: another container with the same directory, now or
// later, would be shown it by the place of the first, which goes with that.
func (s *share) keepRoot(st *unix.Statx_t, r *agentv1.Rootfs) {
	if r.GetShareTag() != agentv1.CachedShareTag {
		return
	}
	id := idOf(st)
	if s.roots[id] {
		r.ShareTag = agentv1.ShareTag
		return
	}
	if s.roots == nil {
		s.roots = make(map[fileID]bool)
	}
	s.roots[id] = true
}

// volumeUse is a volume in one place of a container that is being made.
type volumeUse struct {
	volume *volume
	host   *supervisorv1.HostMount // a copy of the request's
	guest  *agentv1.Mount          // nil: nobody mounts it
}

// use makes a volume that has a name and nothing else yet, for one user.
func (s *share) use(m *supervisorv1.HostMount, guest []*agentv1.Mount) *volumeUse {
	v := &volume{path: "@" + strconv.FormatUint(s.named, 10) + "/" + path.Base(m.SharePath), users: 1}
	s.named++
	u := &volumeUse{volume: v, host: proto.CloneOf(m)}
	u.host.SharePath = v.path
	if i := slices.IndexFunc(guest, func(g *agentv1.Mount) bool { return g.SharePath == m.SharePath && g.ShareTag != agentv1.DiskTag }); i >= 0 {
		u.guest = guest[i]
	}
	return u
}

// tell writes the volume's place to where it is asked for.
func (u *volumeUse) tell() {
	u.host.SharePath = u.volume.path
	if u.guest != nil {
		u.guest.SharePath = u.volume.path
	}
}

// release ends the use of a volume in one place.
func (s *share) release(v *volume) {
	v.users--
	if v.users > 0 {
		return
	}
	if !v.kept {
		s.volumes = slices.DeleteFunc(s.volumes, func(o *volume) bool { return o == v })
		s.remove(v.path)
		return
	}
	its := func(o *volume) bool { return o.kept && o.root.dev == v.root.dev }
	if slices.ContainsFunc(s.volumes, func(o *volume) bool { return its(o) && o.users > 0 }) {
		return
	}
	for _, o := range s.volumes {
		if its(o) && o != v {
			s.remove(o.path)
		}
	}
	s.volumes = slices.DeleteFunc(s.volumes, its)
	s.remove(v.path)
	if s.stale == nil {
		s.stale = make(map[device]bool)
	}
	s.stale[v.root.dev] = true
}

// join replaces volumes that have just been mounted by those of the pod that show
// the same, and adds what is left to these.
func (s *share) join(uses []*volumeUse) error {
	var mounts []*mountinfo.Info // read when there is a reason to
	for _, u := range uses {
		kept := u.guest != nil && u.guest.ShareTag == agentv1.CachedShareTag
		if kept && s.stale[u.volume.root.dev] {
			kept, u.guest.ShareTag = false, agentv1.ShareTag
		}
		var known *volume
		for _, v := range s.volumes {
			if v.root != u.volume.root || v.kept != kept || v.users == 0 {
				continue
			}
			if mounts == nil {
				var err error
				if mounts, err = mountinfo.GetMounts(nil); err != nil {
					return fmt.Errorf("compare volumes: %w", err)
				}
			}
			old, its := mountTree(mounts, v.mount), mountTree(mounts, u.volume.mount)
			if old != nil && slices.Equal(old, its) {
				known = v
			} else if u.host.ReadOnly && writable(old, its) {
				// The one that has a writer, who may have sockets there.
				known = v
				break
			}
		}
		if known == nil {
			u.volume.kept = kept
			s.volumes = append(s.volumes, u.volume)
			continue
		}
		known.users++
		s.release(u.volume)
		u.volume = known
	}
	return nil
}

// mountEntry is what a mount shows.
type mountEntry struct {
	at      string // below the root of its tree
	of      string // the file system and what of it
	options string // of the mount; the first is "ro" or "rw"
}

// mountTree returns the mount with an id and all below it, as one sees them from
// its root; nil if there is none, or what they show was removed. Two that are
// equal show the same files in the same way: while a mount is there, no other file
// system has the number of its own, and no other file the path of its root in that.
func mountTree(all []*mountinfo.Info, id uint64) []mountEntry {
	i := slices.IndexFunc(all, func(m *mountinfo.Info) bool { return uint64(m.ID) == id })
	if i < 0 {
		return nil
	}
	var tree []mountEntry
	for _, m := range all {
		if rel, ok := strings.CutPrefix(m.Mountpoint, all[i].Mountpoint); ok && (rel == "" || rel[0] == '/') {
			if strings.HasSuffix(m.Root, "//deleted") {
				return nil
			}
			tree = append(tree, mountEntry{at: rel, of: fmt.Sprintf("%d:%d %s", m.Major, m.Minor, m.Root), options: m.Options})
		}
	}
	return tree
}

// writable says whether old is its, each without mounts below it, but for being
// writable.
func writable(old, its []mountEntry) bool {
	if len(old) != 1 || len(its) != 1 || old[0].of != its[0].of {
		return false
	}
	rest, ok := strings.CutPrefix(old[0].options, "rw")
	return ok && its[0].options == "ro"+rest
}
