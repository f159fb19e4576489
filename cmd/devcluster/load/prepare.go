package load

import (
	"context"
	"errors"
	"fmt"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Prepare makes a namespace in which a user may do what a load does, and returns when every
// apiserver knows. admins are the administrator's configurations, one for each apiserver,
// without the endpoint under test.
func Prepare(ctx context.Context, admins []*rest.Config, namespace, user string) error {
	for i, config := range admins {
		c, err := kubernetes.NewForConfig(config)
		if err != nil {
			return err
		}
		if i == 0 {
			if err := create(ctx, c, namespace, user); err != nil {
				return fmt.Errorf("namespace %s: %w", namespace, err)
			}
		}
		if err := allowed(ctx, c, namespace, user); err != nil {
			return fmt.Errorf("namespace %s at %s: %w", namespace, config.Host, err)
		}
	}
	return nil
}

// create makes the namespace, a role and its binding. What exists is left as it is.
func create(ctx context.Context, c kubernetes.Interface, namespace, user string) error {
	meta := metav1.ObjectMeta{Name: "load"}
	_, errNamespace := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	_, errRole := c.RbacV1().Roles(namespace).Create(ctx, &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"*"}},
		{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"*"}},
	}}, metav1.CreateOptions{})
	_, errBinding := c.RbacV1().RoleBindings(namespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: meta,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
	}, metav1.CreateOptions{})
	for _, err := range []error{errNamespace, errRole, errBinding} {
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	return nil
}

// allowed waits until an apiserver lets the user write in the namespace.
func allowed(ctx context.Context, c kubernetes.Interface, namespace, user string) error {
	return retry(ctx, 20*time.Second, func(ctx context.Context) error {
		for _, a := range []authorizationv1.ResourceAttributes{
			{Namespace: namespace, Verb: "patch", Resource: "configmaps"},
			{Namespace: namespace, Verb: "update", Group: "coordination.k8s.io", Resource: "leases"},
		} {
			review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{User: user, ResourceAttributes: &a}}
			got, err := c.AuthorizationV1().SubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
			if err != nil {
				return err
			}
			if !got.Status.Allowed {
				return errors.New(user + " may not " + a.Verb + " " + a.Resource + " yet")
			}
		}
		return nil
	})
}

// retry calls act until it succeeds, or the time is over.
func retry(ctx context.Context, limit time.Duration, act func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := act(ctx)
		if err == nil {
			return nil
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return err
		}
	}
}

// sleep sleeps, and returns whether ctx lived that long.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
