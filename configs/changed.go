package configs

import (
	"fmt"
	"reflect"
)

// Changed returns the paths of the keys whose values differ between two
// configurations, in the order of the struct. A list is one key.
func Changed(a, b *Config) []string {
	var paths []string
	var compare func(k *key, a, b reflect.Value)
	compare = func(k *key, a, b reflect.Value) {
		if k.isSection() {
			for i, f := range k.fields {
				compare(f, a.Field(i), b.Field(i))
			}
			return
		}
		// Printed, since an address prefix has fields of its own and empty lists may be nil.
		if fmt.Sprintf("%v", a) != fmt.Sprintf("%v", b) {
			paths = append(paths, k.path)
		}
	}
	compare(schema(), reflect.ValueOf(*a), reflect.ValueOf(*b))
	return paths
}
